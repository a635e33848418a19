// Which library this is: its version, and the architectures that it holds code for.

#include "hardware.h"

extern "C" {

// Raised when a function's arguments change, so that native.py refuses a library of another version.
int qk_cuda_version() { return 1; }

// As CMakeLists.txt names them, such as "80 89 90a 100 120".
const char* qk_cuda_architectures() { return QK_ARCHITECTURES; }

// What an error that a kernel returned means.
const char* qk_cuda_error(int error) { return hw::error_text(error); }

}
