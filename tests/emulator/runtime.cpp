// What the host side of the kernels calls of the CUDA runtime and of torch's CUDA shims.
#include "hopper.cuh"

extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrComputeCapabilityMajor ? 9 : EMULATED_MULTIPROCESSORS;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  if (std::strcmp(name, "cuTensorMapEncodeTiled")) emulator::fail("unknown driver function");
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  return *result = cudaDriverEntryPointSuccess, cudaSuccess;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* data, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  emulator::TensorMap made{static_cast<char*>(data)};
  made.element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;
  made.row_bytes = box[0] * made.element_bytes;
  bool legal = rank == 5 && sizes[0] * made.element_bytes % 16 == 0;
  legal &= made.row_bytes == 128 && swizzle == CU_TENSOR_MAP_SWIZZLE_128B ||
           made.row_bytes == 64 && swizzle == CU_TENSOR_MAP_SWIZZLE_64B;
  legal &= reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int i = 0; i < 5; ++i) {
    legal &= steps[i] == 1 && box[i] > 0 && box[i] <= 256 && sizes[i] > 0 && sizes[i] >> 32 == 0;
    if (i < 4) legal &= strides[i] > 0 && strides[i] % 16 == 0 && strides[i] >> 40 == 0;
    made.sizes[i] = static_cast<uint32_t>(sizes[i]);
    made.box[i] = static_cast<uint16_t>(box[i]);
    if (i < 4) made.strides[i] = strides[i];
  }
  std::memcpy(map, &made, sizeof(made));
  return legal ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
int aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }
}
