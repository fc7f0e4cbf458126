#include "tuning.h"

#include <dlfcn.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>
#include <tuple>

#include "../plugins/logger.h"  // the one thing of TensorRT's that concerns kernels: where messages go
#include "tuning_defaults.h"

namespace qpass {
namespace {

constexpr const char* kFirstLine = "qpass tuning 1";
constexpr const char* kKinds[] = {"w8a8", "w8a8-float32", "w8a16", "w8a16-g32", "w8a16-g64", "w8a16-g128",
    "w4a16", "w4a16-g32", "w4a16-g64", "w4a16-g128"};
constexpr const char* kVariants[] = {"auto", "rule", "skinny", "mma", "sm80_128x128", "sm90_64x64", "sm90_64x128",
    "sm90_128x128", "sm90_128x256", "sm90_mixed", "sm90_split_k"};
static_assert(sizeof(kKinds) / sizeof(*kKinds) == kProductKinds);
static_assert(sizeof(kVariants) / sizeof(*kVariants) == QPASS_VARIANTS);

// A whole number above 0; 0 where a word is none.
int64_t number(const std::string& word) {
  if (word.empty() || word.find_first_not_of("0123456789") != std::string::npos) return 0;
  errno = 0;
  long long value = std::strtoll(word.c_str(), nullptr, 10);
  return errno ? 0 : value;
}

// A line's words, less its comment.
std::vector<std::string> words_of(const std::string& line) {
  std::istringstream stream(line.substr(0, line.find('#')));
  return {std::istream_iterator<std::string>(stream), {}};
}

std::string joined(const std::vector<std::string>& words, size_t first) {
  std::string text;
  for (size_t i = first; i < words.size(); ++i) text += (i == first ? "" : " ") + words[i];
  return text;
}

// The file beside the library that this function is in.
std::string path_of_file() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(&path_of_file), &info) || !info.dli_fname) return "";
  return std::string(info.dli_fname) + ".tuning";
}

Tunings load() {
  Tunings tunings;
  if (std::string wrong = tunings.add(kMeasured); !wrong.empty()) report("the table of tuning that is compiled in: " + wrong);
  const std::string path = path_of_file();
  errno = 0;
  std::ifstream file(path);
  if (!file && errno == ENOENT) return tunings;
  std::ostringstream text;
  text << file.rdbuf();
  std::string wrong = file.bad() || text.fail() ? "it cannot be read, or is empty" : tunings.add(text.str());
  if (!wrong.empty()) report(path + " is ignored: " + wrong + "; make it anew with `qpass plugins tune`");
  return tunings;
}

}  // namespace

ProductKind kind_of(const qpass_smooth_quant_gemm_args& args) { return args.type == QPASS_FLOAT ? kW8A8Float : kW8A8; }

ProductKind kind_of(const qpass_weight_only_matmul_args& args) {
  int group = args.group_size == 0 ? 0 : args.group_size == 32 ? 1 : args.group_size == 64 ? 2 : 3;
  return ProductKind((args.int4 ? kW4A16 : kW8A16) + group);
}

const char* name_of(ProductKind kind) { return kKinds[kind]; }

ProductKind kind_of(const std::string& name) {
  return ProductKind(std::find(std::begin(kKinds), std::end(kKinds), name) - std::begin(kKinds));
}

bool Tuning::Entry::operator<(const Entry& other) const {
  return std::tie(kind, n, k, m) < std::tie(other.kind, other.n, other.k, other.m);
}

qpass_variant Tuning::find(ProductKind kind, int64_t n, int64_t k, int64_t m) const {
  const Entry wanted{kind, n, k, m, QPASS_RULE};
  auto found = std::lower_bound(entries_.begin(), entries_.end(), wanted);
  return found != entries_.end() && found->same_shape(wanted) ? found->variant : QPASS_RULE;
}

std::string Tunings::add(const std::string& text) {
  std::map<std::string, std::vector<Tuning::Entry>> fresh;
  std::vector<Tuning::Entry>* entries = nullptr;
  std::istringstream lines(text);
  std::string line;
  bool first = true;
  for (int at = 1; std::getline(lines, line); ++at) {
    const std::vector<std::string> words = words_of(line);
    const std::string where = "line " + std::to_string(at) + ": ";
    if (words.empty()) continue;
    if (first) {
      if (joined(words, 0) != kFirstLine) return where + "wants \"" + kFirstLine + "\"";
      first = false;
    } else if (words[0] == "device" && words.size() > 1) {
      entries = &fresh[joined(words, 1)];
    } else {
      if (!entries) return where + "a device must come first";
      if (words.size() != 5) return where + "wants kind, N, K, M and variant";
      Tuning::Entry e{kind_of(words[0]), number(words[1]), number(words[2]), number(words[3]),
          qpass_variant_of(words[4].c_str())};
      if (e.kind == kProductKinds) return where + "there is no kind " + words[0];
      if (e.n < 1 || e.k < 1 || e.m < 1) return where + "N, K and M are whole numbers above 0";
      if (e.variant == QPASS_VARIANTS || e.variant == QPASS_AUTO) return where + "there is no variant " + words[4];
      entries->push_back(e);
    }
  }
  if (first) return "it is empty";
  for (auto& [device, added] : fresh) {
    std::sort(added.begin(), added.end());
    auto same = [](const Tuning::Entry& a, const Tuning::Entry& b) { return a.same_shape(b) && a.m == b.m; };
    auto twice = std::adjacent_find(added.begin(), added.end(), same);
    if (twice != added.end()) {
      return device + " has " + kKinds[twice->kind] + " " + std::to_string(twice->n) + " " + std::to_string(twice->k) + " " +
             std::to_string(twice->m) + " twice";
    }
  }
  for (auto& [device, added] : fresh) {
    std::vector<Tuning::Entry>& all = by_device_[device].entries_;
    auto of_new_shape = [&added = added](const Tuning::Entry& old) {
      return std::any_of(added.begin(), added.end(), [&](const Tuning::Entry& e) { return e.same_shape(old); });
    };
    all.erase(std::remove_if(all.begin(), all.end(), of_new_shape), all.end());
    all.insert(all.end(), added.begin(), added.end());
    std::sort(all.begin(), all.end());
  }
  return "";
}

const Tuning& Tunings::of(const std::string& device) const {
  static const Tuning none;
  auto found = by_device_.find(device);
  return found == by_device_.end() ? none : found->second;
}

const Tuning& tuning_of(const std::string& device) {
  static const Tunings tunings = load();
  return tunings.of(device);
}

}  // namespace qpass

const char* qpass_variant_name(qpass_variant variant) { return qpass::kVariants[variant]; }

qpass_variant qpass_variant_of(const char* name) {
  int i = 0;
  while (i < QPASS_VARIANTS && std::strcmp(qpass::kVariants[i], name)) ++i;
  return qpass_variant(i);
}
