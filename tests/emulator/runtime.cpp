// What the host side of the kernels calls of the CUDA runtime and of torch's CUDA shims.
#include "emulator.h"

extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = EMULATED_MULTIPROCESSORS, cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
int aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }
}
