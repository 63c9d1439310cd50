// Makes the library importable as sepo_kernels._C. Each operation registers itself in its own file
// with TORCH_LIBRARY_FRAGMENT(sepo, m); the module has no attributes.
#include <torch/extension.h>

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {}
