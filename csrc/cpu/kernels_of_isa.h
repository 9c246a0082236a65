// Every kernel, over the vectors defined before this; included inside a namespace of its own by isa_*.cpp.

#include "cpu/vec_common.h"
//
#include "cpu/add_steer_rmsnorm.h"
#include "cpu/grouped_decode_attention.h"
#include "cpu/linear.h"
#include "cpu/rope_append.h"
#include "cpu/sample.h"
#include "cpu/silu_mul.h"

static const Kernels kKernels = {kName, add_steer_rmsnorm, rope_append, grouped_decode_attention, silu_mul, linear,
                                 sample};
