// infoutil_fast._C: fast versions of the ops for the CPU, over numpy arrays. dispatch.py calls them; ops.py has checked the arguments.
#include <pybind11/pybind11.h>

void bind_assemble_patterns(pybind11::module_ &m);
void bind_channel_sums(pybind11::module_ &m);
void bind_conv_grad_sqnorm(pybind11::module_ &m);
void bind_gram_sqnorm(pybind11::module_ &m);
void bind_linear_grad_sqnorm(pybind11::module_ &m);
void bind_masked_patches(pybind11::module_ &m);

PYBIND11_MODULE(_C, m) {
    m.doc() = "Fast versions of infoutil_fast.ops for the CPU, over numpy arrays (bfloat16 as uint16).";
    bind_assemble_patterns(m);
    bind_channel_sums(m);
    bind_conv_grad_sqnorm(m);
    bind_gram_sqnorm(m);
    bind_linear_grad_sqnorm(m);
    bind_masked_patches(m);
}
