// What kernel-builder asks for besides the bindings in csrc: a Python module of the library's name.
#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
