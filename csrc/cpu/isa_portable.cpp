// The kernels for any CPU.
#include "cpu/std.h"

namespace icon2 {
namespace portable {
#include "cpu/vec_portable.h"
//
#include "cpu/kernels_of_isa.h"
}  // namespace portable

const Kernels kPortable = portable::kKernels;

}  // namespace icon2
