// the launches that nvcc compiles, for selection.cpp: no header of torch's on one side, none of CUDA's on the other
#pragma once

namespace spear_fast {

struct BeamStep;
struct SampleStep;
struct Half;
struct BFloat16;

// each queues its kernels on a cudaStream_t of the current device; returns the cudaError_t
template <typename scalar_t>
int launch_beam_step(const BeamStep& arguments, void* stream);
template <typename scalar_t>
int launch_sample_step(const SampleStep& arguments, void* stream);

}  // namespace spear_fast
