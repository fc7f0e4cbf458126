// Errors as TensorRT's log has them.
#pragma once

#include <string>

namespace qpass {

// What TensorRT hands to setLoggerFinder, of any version.
void set_logger_finder(void* finder);

// Logs an error by the logger of the TensorRT that loaded this library; on standard error where there is none.
void report(const std::string& text);

}  // namespace qpass
