// the launches that nvcc compiles, for selection.cpp: no header of torch's on one side, none of CUDA's on the other
#pragma once

namespace spear_fast {

struct BeamStep;
struct SampleStep;
struct FusedStep;
struct Half;
struct BFloat16;

// each queues its kernels on a cudaStream_t of the current device; returns the cudaError_t
template <typename scalar_t>
int launch_beam_step(const BeamStep& arguments, void* stream);
template <typename scalar_t>
int launch_sample_step(const SampleStep& arguments, void* stream);
// blocks: all of them must find room at once. rows: that the kernel takes, at most: 1, 4, 8 or 16
template <typename scalar_t>
int launch_fused_step(const FusedStep& arguments, int64_t blocks, int64_t rows, void* stream);

}  // namespace spear_fast
