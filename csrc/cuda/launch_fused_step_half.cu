#include "launch_fused_step.h"

template int spear_fast::launch_fused_step<spear_fast::Half>(const FusedStep&, int64_t, int64_t, void*);
