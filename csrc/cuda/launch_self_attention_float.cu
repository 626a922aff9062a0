#include "launch_self_attention.h"

template int spear_fast::launch_self_attention<float>(const SelfAttention&, bool, const SelfAttentionPlan&, void*);
