// What every kernel starts with: names of integers, 16-bit floats. No header of the toolkit is included, so NVRTC needs
// nothing but itself. The host defines BF16.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#if BF16
#define TYPE "bf16"  // as instructions call it
#else
#define TYPE "f16"
#endif

// Of float16 whatever the model's dtype: scales of an int4 cache are.
__device__ __forceinline__ float half_to_float(u16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
  return result;
}

__device__ __forceinline__ u16 float_to_half(float value) {
  u16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return result;
}

__device__ __forceinline__ float wide(u16 value) {
#if BF16
  return __uint_as_float((u32)value << 16);
#else
  return half_to_float(value);
#endif
}

__device__ __forceinline__ u16 narrow(float value) {
  u16 result;
  asm("cvt.rn." TYPE ".f32 %0, %1;" : "=h"(result) : "f"(value));
  return result;
}

// silu(gate) * up, each rounded as torch rounds it.
__device__ __forceinline__ u16 silu_times(u16 gate, u16 up) {
  const float value = wide(gate);
  return narrow(wide(narrow(__fdiv_rn(value, __fadd_rn(1.0f, expf(-value))))) * wide(up));
}

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }
