// Errors as TensorRT's log has them.
#pragma once

#include <string>

namespace qpass {

// Logs an error by the logger of the TensorRT that loaded this library; on standard error where there is none.
void report(const std::string& text);

}  // namespace qpass
