// Made of tuning/*.json by `python -m benchmarks.tuning`; not to be edited.
#pragma once

namespace qpass {

constexpr const char kMeasured[] =
    "qpass tuning 1\n"
    "device NVIDIA H100 80GB HBM3\n"
    "device NVIDIA H200\n"
    "w4a16-g128 4096 4096 16384 rule\n"
    "w4a16-g128 4096 11008 16384 rule\n"
    "w4a16-g128 8192 8192 16384 rule\n"
    "w4a16-g128 8192 28672 16384 rule\n"
    "w4a16-g128 11008 4096 16384 rule\n"
    "w4a16-g128 57344 8192 16384 rule\n"
    "w8a16 4096 4096 8191 rule\n"
    "w8a16 4096 4096 16384 sm90_128x256\n"
    "w8a16 4096 11008 4 rule\n"
    "w8a16 4096 11008 8 skinny\n"
    "w8a16 4096 11008 8191 rule\n"
    "w8a16 4096 11008 16384 sm90_128x256\n"
    "w8a16 8192 8192 16384 rule\n"
    "w8a16 8192 28672 8191 rule\n"
    "w8a16 8192 28672 16384 sm90_128x256\n"
    "w8a16 11008 4096 8 skinny\n"
    "w8a16 11008 4096 16384 rule\n"
    "w8a16 57344 8192 16384 rule\n"
    "w8a8 4096 4096 128 rule\n"
    "w8a8 4096 4096 256 sm90_64x128\n"
    "w8a8 4096 4096 1024 rule\n"
    "w8a8 4096 4096 2048 sm90_128x128\n"
    "w8a8 4096 4096 16384 rule\n"
    "w8a8 4096 11008 128 rule\n"
    "w8a8 4096 11008 256 sm90_64x128\n"
    "w8a8 4096 11008 16384 rule\n"
    "w8a8 8192 8192 16384 rule\n"
    "w8a8 8192 28672 16384 rule\n"
    "w8a8 11008 4096 128 rule\n"
    "w8a8 11008 4096 256 sm90_64x128\n"
    "w8a8 11008 4096 512 sm90_128x128\n"
    "w8a8 11008 4096 1024 rule\n"
    "w8a8 11008 4096 2048 sm90_128x128\n"
    "w8a8 11008 4096 8191 rule\n"
    "w8a8 11008 4096 16384 sm90_128x128\n"
    "w8a8 57344 8192 128 rule\n"
    "w8a8 57344 8192 256 sm90_128x128\n"
    "w8a8 57344 8192 16384 rule\n";

}  // namespace qpass
