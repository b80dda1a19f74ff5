// The CUDA side of the op set: checks, parameters and dispatch. What the ops mean, and the checks
// that both implementations share, is in sparsek_vllm/core/ops.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <limits>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "params.h"
#include "portable/portable.h"
#ifdef SPARSEK_SM90
#include "sm90/sm90.h"
#endif

#ifndef SPARSEK_NAMESPACE
#define SPARSEK_NAMESPACE sparsek
#endif

// Weak, so that the library loads beside a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace sparsek {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr double kLog2e = 1.4426950408889634;
// Where prefill looks for maxima it rescales rows only when that of one of their warp's has grown
// by more than this many powers of two: exponentials stay below 2^8, which fp16 holds. Idea:
// FlashAttention-4. (Hopper's looks for them in some tiles only: see kMostWeight there.)
constexpr float kRescaleSlack = 8.0f;
// In powers of two, and not 0, by which -inf would become NaN.
float factor_of_scores(double scale) {
  return std::max(static_cast<float>(scale * kLog2e), std::numeric_limits<float>::min());
}
// AttentionParams::keys_a_pair of 16 bits: memory's bandwidth over a multiprocessor's rate of
// products, on an H100.
constexpr float kKeysAPair = 0.65f;

void check(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error(message);
}
void check(cudaError_t error) {
  check(error == cudaSuccess, std::string("CUDA error: ") + cudaGetErrorString(error));
}

// The device of the tensors for the length of a call, and its current stream.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor) {
    device_ = tensor.get_device_index();
    check(cudaGetDevice(&previous_));
    if (device_ != previous_) check(cudaSetDevice(device_));
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream(device_, &stream) == 0, "no CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }
  ~DeviceScope() {
    if (device_ != previous_) cudaSetDevice(previous_);
  }
  cudaStream_t stream() const { return stream_; }
  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  bool is_hopper() const { return attribute(cudaDevAttrComputeCapabilityMajor) == 9; }

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device_));
    return value;
  }

  int device_ = 0, previous_ = 0;
  cudaStream_t stream_ = nullptr;
};

void check_last_stride(const char* name, const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  check(tensor.size(last) <= 1 || tensor.stride(last) == 1,
        std::string(name) + " must be contiguous in its last dimension on CUDA");
}

const int* int32_data(const char* name, const Tensor& tensor) {
  check(tensor.scalar_type() == ScalarType::Int, std::string(name) + " must be int32 on CUDA");
  check_last_stride(name, tensor);
  return static_cast<const int*>(tensor.data_ptr());
}

Float float_type(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Float::kFloat32;
    case ScalarType::Half:
      return Float::kFloat16;
    case ScalarType::BFloat16:
      return Float::kBFloat16;
    default:
      throw std::runtime_error(std::string(name) + " must be float32, float16 or bfloat16 on CUDA");
  }
}

// Strides count where a dimension has more than one element; any other may hold anything.
int64_t stride(const Tensor& tensor, int dim) {
  return tensor.size(dim) > 1 ? tensor.stride(dim) : 0;
}

int64_t element_bytes(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float8_e4m3fn ? 1 : 2;
}

// Kernels copy 16 bytes at a time.
void check_aligned(const char* name, const Tensor& tensor) {
  bool aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  for (int i = 0; i + 1 < tensor.dim(); ++i)
    aligned &= stride(tensor, i) * element_bytes(tensor) % 16 == 0;
  check(aligned, std::string(name) +
                     " must begin at a multiple of 16 bytes on CUDA, and its strides must be "
                     "multiples of 16 bytes");
}

KVTensor kv_tensor(const Tensor& tensor) {
  const int dims = static_cast<int>(tensor.dim());
  const bool paged = dims == 4;
  return {tensor.data_ptr(),        paged ? stride(tensor, 0) : 0, stride(tensor, dims - 3),
          stride(tensor, dims - 2), paged ? tensor.size(0) : 1,    tensor.size(dims - 3)};
}

// The factors of keys or values, and the stride from one head's to the next.
std::pair<const float*, int> scales(const OptionalTensor& tensor) {
  if (!tensor) return {nullptr, 0};
  check(tensor->scalar_type() == ScalarType::Float, "k_scale and v_scale must be float32");
  int64_t step = 0;
  int dims = 0;
  for (int i = 0; i < tensor->dim(); ++i) {
    if (tensor->size(i) == 1) continue;
    check(++dims == 1, "k_scale and v_scale must have one dimension of more than one element");
    step = tensor->stride(i);
  }
  return {static_cast<const float*>(tensor->data_ptr()), static_cast<int>(step)};
}

// Sizes of heads that kernels are compiled for, as in sparsek_vllm/build; tests compile fewer.
#ifndef SPARSEK_HEAD_DIMS
#define SPARSEK_HEAD_DIMS 32, 64, 80, 96, 112, 128, 160, 192, 256, 512
#endif
using HeadDims = std::integer_sequence<int, SPARSEK_HEAD_DIMS>;
using HopperHeadDims = std::integer_sequence<int, 64, 128, 256>;

// Calls f with the first of these that is large enough, as a type.
template <int... kSizes, typename F>
bool with_size(int64_t size, std::integer_sequence<int, kSizes...>, F f) {
  return ((size <= kSizes && (f(std::integral_constant<int, kSizes>{}), true)) || ...);
}

// Calls f<T, KV, head_dim>, for the types and sizes that attention is compiled for.
template <typename Sizes, typename F>
void for_types_and_size(ScalarType type, bool fp8, int64_t head_dim, F f) {
  const auto with_types = [&](auto zero, auto kv_zero) {
    using T = decltype(zero);
    using KV = decltype(kv_zero);
    const bool known = with_size(head_dim, Sizes{}, [&](auto size) {
      f.template operator()<T, KV, decltype(size)::value>();
    });
    check(known, "head_dim has no kernel: " + std::to_string(head_dim));
  };
  const auto with_type = [&](auto zero) {
    if (fp8) {
      with_types(zero, E4M3{});
    } else {
      with_types(zero, zero);
    }
  };
  if (type == ScalarType::Half) {
    with_type(__half{});
  } else if (type == ScalarType::BFloat16) {
    with_type(__nv_bfloat16{});
  } else {
    throw std::runtime_error("q must be float16 or bfloat16 on CUDA");
  }
}

struct LaunchPortable {
  const AttentionParams& p;
  bool with_prefill, with_decode;
  cudaStream_t stream;

  template <typename T, typename KV, int kHeadDim>
  void operator()() const {
    if (with_prefill) check(portable::prefill<T, KV, kHeadDim>(p, stream));
    if (with_decode) check(portable::decode<T, KV, kHeadDim>(p, stream));
  }
};

#ifdef SPARSEK_SM90
struct LaunchHopper {
  const AttentionParams& p;
  bool with_prefill, with_decode;
  cudaStream_t stream;

  // In this order prefill takes the multiprocessors that decode leaves.
  template <typename T, typename KV, int kHeadDim>
  void operator()() const {
    if (with_decode) check(sm90::decode<T, KV, kHeadDim>(p, stream));
    if (with_prefill)
      p.softcap > 0 ? prefill<T, KV, kHeadDim, true>() : prefill<T, KV, kHeadDim, false>();
  }
  template <typename T, typename KV, int kHeadDim, bool kSoftcap>
  void prefill() const {
    // (Where there is none, nobody asks for it.)
    if constexpr (sm90::has_prefill(kHeadDim, sizeof(KV) == 1, kSoftcap))
      check(sm90::prefill<T, KV, kHeadDim, kSoftcap>(p, stream));
  }
};
#endif

// Which requests are decode's. It splits long keys, which the portable prefill does not; beside
// Hopper's prefill it reads them once for every unit of rows, and prefill once for many more.
void share_out_requests(AttentionParams& p, bool hopper_prefill, bool hopper_decode,
                        int64_t most_rows) {
  p.long_keys = 32 * 1024;
  if (p.batch_invariant) {
    p.decode_rows = p.long_decode_rows = 0;
  } else if (p.max_seqlen_k < 1024) {
    p.decode_rows = p.long_decode_rows = portable::kDecodeRows;
  } else if (!hopper_prefill) {
    // A few tiles of rows re-read keys from L2 at little cost.
    p.decode_rows = p.long_decode_rows = 4 * portable::kDecodeRows;
  } else {
#ifdef SPARSEK_SM90
    const int unit_rows =
        hopper_decode ? sm90::most_decode_rows(p.head_dim, p.softcap > 0) : portable::kDecodeRows;
    const int64_t tiles = (most_rows + unit_rows - 1) / unit_rows * p.batch * p.kv_heads;
    // Decode also takes more rows where there are few of these tiles, though it reads keys for
    // each: adding up what prefill splits takes as long as some thousand keys. (Where there are
    // very many keys, that is little.)
    const int64_t keys = most_keys(p, p.max_seqlen_q);
    const int64_t quarters = keys > 16 * 1024 ? 0 : keys > 8 * 1024 ? 1 : 3;
    const bool few = 4 * tiles <= quarters * p.multiprocessors;
    // And it takes requests that the others would wait for, where prefill has no blocks to split
    // them for.
    const bool splits = int64_t{2} * p.batch * p.kv_heads <= p.multiprocessors;
    p.decode_rows = few ? std::numeric_limits<int>::max() : unit_rows;
    p.long_decode_rows = few ? p.decode_rows : splits ? unit_rows : 2 * unit_rows;
#endif
  }
  p.most_rows = std::min<int64_t>(most_rows, p.long_decode_rows);
}

// Fills in what follows from the rest and from the device, and launches.
//
// Batch-invariant, all is prefill's, which then splits no keys and whose key tiles depend on the
// request alone; without slack, and with maxima looked for in every tile, a row's rescaling does
// not depend on the others of its warp.
void run_attention(AttentionParams& p, const Tensor& q, bool fp8, const OptionalTensor& workspace,
                   bool hopper, int64_t min_seqlen_q) {
  const int64_t head_dim = q.size(q.dim() - 1), most_rows = int64_t{p.max_seqlen_q} * p.group;
  check(head_dim % (fp8 ? 16 : 8) == 0,
        "head_dim must be a multiple of 8 on CUDA, or of 16 with fp8 keys and values, got " +
            std::to_string(head_dim));
  p.head_dim = static_cast<int>(head_dim);
  p.group_divisor = FastDivisor(static_cast<uint32_t>(p.group));
  p.rescale_slack = p.batch_invariant ? 0 : kRescaleSlack;
  const DeviceScope device(q);
  p.multiprocessors = device.multiprocessors();
#ifdef SPARSEK_SM90
  hopper = hopper && !p.spans && device.is_hopper() && head_dim <= sm90::kMostHeadDim &&
           sm90::has_tensor_map(p.k, p.kv_heads) && sm90::has_tensor_map(p.v, p.kv_heads);
  const bool hopper_prefill =
      hopper && !p.bias && !p.alibi_slopes && sm90::has_prefill(p.head_dim, fp8, p.softcap > 0);
  const bool hopper_decode = hopper && sm90::has_decode(p.head_dim);
#else
  const bool hopper_prefill = false, hopper_decode = false;
#endif
  share_out_requests(p, hopper_prefill, hopper_decode, most_rows);
  const bool with_prefill = most_rows > p.decode_rows;
  const bool with_decode = !p.batch_invariant && min_seqlen_q * p.group <= p.long_decode_rows;

  const bool both = with_prefill && with_decode;
  if (hopper_prefill && hopper_decode && both) p.keys_a_pair = kKeysAPair * (fp8 ? 2 : 1);

  const int64_t arrivals = int64_t{p.multiprocessors} * (kWorkspaceCounters + kDecodeCounters);
  const int64_t floats =
      kTileCounters + arrivals + int64_t{p.multiprocessors} * (kWorkspaceFloats + kDecodeFloats);
  check(workspace && workspace->scalar_type() == ScalarType::Float && workspace->numel() >= floats,
        "workspace must hold " + std::to_string(floats) + " float32 zeros");
  p.tile_counters = static_cast<int*>(workspace->data_ptr());
  p.arrivals = p.tile_counters + kTileCounters;
  p.partials = static_cast<float*>(workspace->data_ptr()) + kTileCounters + arrivals;
  // Prefill waits for no kernel but the decode of its own call: no other thread's may come between.
  static std::mutex launching;
  const std::lock_guard<std::mutex> lock(launching);
  const auto type = q.scalar_type();
  const cudaStream_t stream = device.stream();
#ifdef SPARSEK_SM90
  if (hopper_prefill || hopper_decode)
    for_types_and_size<HopperHeadDims>(
        type, fp8, head_dim,
        LaunchHopper{p, with_prefill && hopper_prefill, with_decode && hopper_decode, stream});
#endif
  const bool portable_prefill = with_prefill && !hopper_prefill;
  const bool portable_decode = with_decode && !hopper_decode;
  if (portable_prefill || portable_decode)
    for_types_and_size<HeadDims>(type, fp8, head_dim,
                                 LaunchPortable{p, portable_prefill, portable_decode, stream});
}

void varlen_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                      const Tensor& seq_lens, const OptionalTensor& block_table,
                      const OptionalTensor& k_starts, const OptionalTensor& q_offsets,
                      const OptionalTensor& spans, const OptionalTensor& bias,
                      const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                      const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                      const OptionalTensor& workspace, bool hopper, bool batch_invariant,
                      int64_t min_seqlen_q, int64_t max_seqlen_q, int64_t max_seqlen_k,
                      double scale, int64_t window_left, int64_t window_right, double softcap,
                      Tensor out, OptionalTensor lse) {
  const int64_t batch = seq_lens.size(0), total_q = q.size(0);
  if (batch == 0 || total_q == 0) return;
  const int64_t kv_heads = k.size(k.dim() - 2);
  const bool fp8 = k.scalar_type() == ScalarType::Float8_e4m3fn;
  check(fp8 || (k.scalar_type() == q.scalar_type() && !k_scale && !v_scale),
        "k must have the dtype of q on CUDA, without k_scale and v_scale, or be float8_e4m3fn");
  check(total_q < (int64_t{1} << 31) && kv_heads < 65536, "q has too many rows or heads");
  for (const auto& [name, tensor] :
       {std::pair<const char*, const Tensor*>{"q", &q}, {"k", &k}, {"v", &v}, {"out", &out}})
    check_aligned(name, *tensor);

  AttentionParams p{};
  p.q = q.data_ptr();
  p.q_stride_token = stride(q, 0);
  p.q_stride_head = stride(q, 1);
  p.out = out.data_ptr();
  p.out_stride_token = stride(out, 0);
  p.out_stride_head = stride(out, 1);
  if (lse) {
    check_last_stride("lse", *lse);
    p.lse = static_cast<float*>(lse->data_ptr());
    p.lse_stride_head = stride(*lse, 0);
  }
  p.k = kv_tensor(k);
  p.v = kv_tensor(v);
  std::tie(p.k_scale, p.k_scale_stride) = scales(k_scale);
  std::tie(p.v_scale, p.v_scale_stride) = scales(v_scale);
  p.cu_seqlens_q = int32_data("cu_seqlens_q", cu_seqlens_q);
  p.seq_lens = int32_data("seq_lens", seq_lens);
  if (block_table) {
    check(k.size(1) % 16 == 0,
          "block_size must be a multiple of 16 on CUDA, got " + std::to_string(k.size(1)));
    p.block_table = int32_data("block_table", *block_table);
    p.block_table_stride = stride(*block_table, 0);
    p.block_divisor = FastDivisor(static_cast<uint32_t>(k.size(1)));
  } else {
    p.block_divisor = FastDivisor(uint32_t{1} << 31);
  }
  if (k_starts) p.k_starts = int32_data("starts", *k_starts);
  if (q_offsets) p.q_offsets = int32_data("q_offsets", *q_offsets);
  if (spans) {
    p.spans = int32_data("spans", *spans);
    check(spans->is_contiguous() && reinterpret_cast<uintptr_t>(p.spans) % 8 == 0,
          "spans must be contiguous and begin at a multiple of 8 bytes on CUDA");
  }
  if (sinks) {
    p.sinks = sinks->data_ptr();
    p.sinks_type = float_type("sinks", *sinks);
    p.sinks_stride = stride(*sinks, 0);
  }
  if (alibi_slopes) {
    check(alibi_slopes->scalar_type() == ScalarType::Float, "alibi_slopes must be float32");
    check_last_stride("alibi_slopes", *alibi_slopes);
    p.alibi_slopes = static_cast<const float*>(alibi_slopes->data_ptr());
  }
  if (bias) {
    p.bias = bias->data_ptr();
    p.bias_type = float_type("bias", *bias);
    for (int i = 0; i < 4; ++i) p.bias_stride[i] = stride(*bias, i);
  }
  p.batch = static_cast<int>(batch);
  p.kv_heads = static_cast<int>(kv_heads);
  p.group = static_cast<int>(q.size(1) / kv_heads);
  p.total_q = static_cast<int>(total_q);
  p.max_seqlen_q = static_cast<int>(std::clamp<int64_t>(max_seqlen_q, 1, total_q));
  p.scale = static_cast<float>(scale);
  p.scale_log2e = factor_of_scores(scale);
  p.softcap = static_cast<float>(softcap);
  // Large enough for any position, small enough that no sum overflows.
  const int64_t unlimited = int64_t{1} << 30;
  const int64_t of_table = block_table ? block_table->size(1) * k.size(1) : unlimited;
  p.max_seqlen_k =
      static_cast<int>(std::max<int64_t>(1, std::min({max_seqlen_k, of_table, unlimited})));
  p.window_left = static_cast<int>(window_left < unlimited ? window_left : -1);
  p.window_right = static_cast<int>(window_right < unlimited ? window_right : -1);

  p.batch_invariant = batch_invariant;
  run_attention(p, q, fp8, workspace, hopper, min_seqlen_q);
}

// The same number of queries and keys for all, without a mask. All of [B, H, S, D], or all of that
// after a transposition from [B, S, H, D].
void attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& workspace,
               bool hopper, double scale, Tensor out) {
  const int64_t batch = q.size(0), heads = q.size(1), rows = q.size(2);
  if (batch * heads * rows == 0) return;
  check(batch * heads * rows < (int64_t{1} << 31), "q has too many rows");
  // Rows lie one behind the other head by head, or, of each head by itself, batch entry by batch
  // entry. Dimensions of one element have no say.
  bool by_head = true, by_token = true;
  const auto row_stride = [&](const Tensor& tensor, bool through_heads) {
    if (rows > 1) return tensor.stride(2);
    return through_heads && heads > 1 ? tensor.stride(1) : stride(tensor, 0);
  };
  for (const auto& [name, tensor] :
       {std::pair<const char*, const Tensor*>{"q", &q}, {"k", &k}, {"v", &v}, {"out", &out}}) {
    check_aligned(name, *tensor);
    const int64_t through = row_stride(*tensor, true), within = row_stride(*tensor, false);
    by_head &= heads == 1 || tensor->stride(1) == rows * through;
    by_head &= batch == 1 || tensor->stride(0) == heads * rows * through;
    by_token &= batch == 1 || tensor->stride(0) == rows * within;
  }
  check(by_head || by_token, "q, k, v and out must be [B, H, S, D] or transposed [B, S, H, D]");
  AttentionParams p{};
  const int64_t requests = by_head ? batch * heads : batch;
  const auto packed = [&](const Tensor& tensor) -> KVTensor {
    return {tensor.data_ptr(), 0, row_stride(tensor, by_head), by_head ? 0 : stride(tensor, 1), 1,
            requests * rows};
  };
  p.k = packed(k);
  p.v = packed(v);
  p.q = q.data_ptr();
  p.out = out.data_ptr();
  const KVTensor q_rows = packed(q), out_rows = packed(out);
  p.q_stride_token = q_rows.stride_token;
  p.q_stride_head = q_rows.stride_head;
  p.out_stride_token = out_rows.stride_token;
  p.out_stride_head = out_rows.stride_head;
  p.block_divisor = FastDivisor(uint32_t{1} << 31);
  p.batch = static_cast<int>(requests);
  p.kv_heads = by_head ? 1 : static_cast<int>(heads);
  p.group = 1;
  p.total_q = static_cast<int>(requests * rows);
  p.max_seqlen_q = p.max_seqlen_k = static_cast<int>(rows);
  p.scale = static_cast<float>(scale);
  p.scale_log2e = factor_of_scores(scale);
  p.window_left = p.window_right = -1;
  run_attention(p, q, false, workspace, hopper, rows);
}

void write_kv(const Tensor& key, const Tensor& value, Tensor k_cache, Tensor v_cache,
              const Tensor& slot_mapping, const OptionalTensor& k_scale,
              const OptionalTensor& v_scale) {
  if (slot_mapping.numel() == 0) return;
  const auto type = key.scalar_type();
  check(type == ScalarType::Half || type == ScalarType::BFloat16,
        "key must be float16 or bfloat16 on CUDA");
  const bool fp8 = k_cache.scalar_type() == ScalarType::Float8_e4m3fn;
  check(fp8 || (k_cache.scalar_type() == type && !k_scale && !v_scale),
        "k_cache must have the dtype of key on CUDA, without k_scale and v_scale, or be "
        "float8_e4m3fn");
  check_last_stride("slot_mapping", slot_mapping);
  const DeviceScope device(key);
  WriteParams p{};
  p.key = key.data_ptr();
  p.value = value.data_ptr();
  p.k_cache = k_cache.data_ptr();
  p.v_cache = v_cache.data_ptr();
  p.key_stride_token = stride(key, 0);
  p.key_stride_head = stride(key, 1);
  p.value_stride_token = stride(value, 0);
  p.value_stride_head = stride(value, 1);
  p.k_stride_block = stride(k_cache, 0);
  p.k_stride_token = stride(k_cache, 1);
  p.k_stride_head = stride(k_cache, 2);
  p.v_stride_block = stride(v_cache, 0);
  p.v_stride_token = stride(v_cache, 1);
  p.v_stride_head = stride(v_cache, 2);
  p.type = float_type("key", key);
  p.fp8 = fp8;
  std::tie(p.k_scale, p.k_scale_stride) = scales(k_scale);
  std::tie(p.v_scale, p.v_scale_stride) = scales(v_scale);
  p.slots = slot_mapping.data_ptr();
  p.slots_are_64_bit = slot_mapping.scalar_type() == ScalarType::Long;
  p.block_size = static_cast<int>(k_cache.size(1));
  p.tokens = static_cast<int>(slot_mapping.size(0));
  p.kv_heads = static_cast<int>(key.size(1));
  p.head_dim = static_cast<int>(key.size(2));
  int64_t bits = p.head_dim * 2;
  for (const Tensor* tensor :
       {&key, &value, static_cast<const Tensor*>(&k_cache), static_cast<const Tensor*>(&v_cache)}) {
    // In bytes, were the elements of the cache as long as those of key.
    const int64_t factor = 2 / element_bytes(*tensor);
    bits |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor->data_ptr())) * factor;
    for (int i = 0; i + 1 < tensor->dim(); ++i) bits |= stride(*tensor, i) * 2;
  }
  p.aligned = bits % 16 == 0;
  if (p.kv_heads * p.head_dim > 0) check(portable::write_kv(p, device.stream()));
}

void merge_states(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                  const Tensor& lse_b, Tensor out, Tensor lse) {
  if (out.numel() == 0) return;
  const DeviceScope device(out);
  MergeParams p{};
  p.out_a = out_a.data_ptr();
  p.out_b = out_b.data_ptr();
  p.out = out.data_ptr();
  p.lse_a = static_cast<const float*>(lse_a.data_ptr());
  p.lse_b = static_cast<const float*>(lse_b.data_ptr());
  p.lse = static_cast<float*>(lse.data_ptr());
  for (int i = 0; i < 3; ++i) {
    p.a_stride[i] = stride(out_a, i);
    p.b_stride[i] = stride(out_b, i);
    p.out_stride[i] = stride(out, i);
  }
  for (int i = 0; i < 2; ++i) {
    p.lse_a_stride[i] = stride(lse_a, i);
    p.lse_b_stride[i] = stride(lse_b, i);
    p.lse_stride[i] = stride(lse, i);
  }
  p.tokens = static_cast<int>(out.size(0));
  p.heads = static_cast<int>(out.size(1));
  p.head_dim = static_cast<int>(out.size(2));
  switch (float_type("out_a", out_a)) {
    case Float::kFloat32:
      return check(portable::merge_states<float>(p, device.stream()));
    case Float::kFloat16:
      return check(portable::merge_states<__half>(p, device.stream()));
    case Float::kBFloat16:
      return check(portable::merge_states<__nv_bfloat16>(p, device.stream()));
  }
}

}  // namespace
}  // namespace sparsek

STABLE_TORCH_LIBRARY_IMPL(SPARSEK_NAMESPACE, CUDA, m) {
  m.impl("varlen_attention", TORCH_BOX(&sparsek::varlen_attention));
  m.impl("attention", TORCH_BOX(&sparsek::attention));
  m.impl("write_kv", TORCH_BOX(&sparsek::write_kv));
  m.impl("merge_states", TORCH_BOX(&sparsek::merge_states));
}
