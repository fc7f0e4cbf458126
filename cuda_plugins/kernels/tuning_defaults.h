// Made of tuning/*.json by `python -m benchmarks.tuning`; not to be edited.
#pragma once

namespace qpass {

constexpr const char kMeasured[] =
    "qpass tuning 1\n"
    "device NVIDIA H100 80GB HBM3\n"
    "device NVIDIA H200\n";

}  // namespace qpass
