#include "logger.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>

namespace qpass {

// ILogger and ILoggerFinder as TensorRT 8 and 10 have them … (Not in a namespace without a name: of such a class a compiler knows
// that nothing is derived from it, so it makes calls of what it leaves open abort.)
namespace v10 {
struct Logger {
  virtual void log(int32_t severity, const char* text) noexcept = 0;
};
struct Finder {
  virtual Logger* find() = 0;
};
}  // namespace v10

// … and as TensorRT 11 and TensorRT-RTX do, where four functions of IVersionedInterface come first.
namespace v11 {
struct Versioned {
  virtual int32_t language() const noexcept = 0;
  virtual void* information() const noexcept = 0;
  virtual void destroy() noexcept = 0;
  virtual void destroy_and_free() noexcept = 0;
};
struct Logger : Versioned {
  virtual void log(int32_t severity, const char* text) noexcept = 0;
};
struct Finder : Versioned {
  virtual Logger* find() = 0;
};
}  // namespace v11

namespace {

constexpr int32_t kError = 1;  // ILogger::Severity

void* finder = nullptr;
int32_t version = 0;  // of the library that the finder is from; 0: not known

// Which library an object's class is from, and what it says its version is: 8601 for TensorRT 8.6.1,
// 101600 for 10.16, 10701 for RTX 1.7.
int32_t version_behind(void* object) {
  Dl_info info;
  if (!object || !dladdr(*static_cast<void**>(object), &info) || !info.dli_fname) return 0;
  void* library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return 0;
  auto ask = reinterpret_cast<int32_t (*)()>(dlsym(library, "getInferLibVersion"));
  int32_t told = ask ? ask() : 0;
  dlclose(library);
  return told;
}

template <typename Finder>
bool log(const std::string& text) {
  auto* logger = static_cast<Finder*>(finder)->find();
  if (logger) logger->log(kError, text.c_str());
  return logger;
}

}  // namespace

void report(const std::string& text) {
  const std::string line = "qpass: " + text;
  const bool is_old = version < 10000 || (version >= 100000 && version < 110000);
  if (version && (is_old ? log<v10::Finder>(line) : log<v11::Finder>(line))) return;
  std::fprintf(stderr, "%s\n", line.c_str());
}

}  // namespace qpass

// TensorRT looks for this function in a plugin library, whatever its version.
extern "C" __attribute__((visibility("default"))) void setLoggerFinder(void* given) {
  qpass::finder = given;
  qpass::version = qpass::version_behind(given);
}
