// All kernels, compiled for the instruction set METALORA_ISA.
#include "attention.h"
#include "kept.h"
#include "low_rank.h"
#include "small_product.h"
#include "sums.h"
#ifdef METALORA_BF16_PRODUCTS
#include "low_rank_bf16.h"
#endif

namespace metalora::cpu::METALORA_ISA {

constexpr Kernels kTable = {
    low_rank_kernels_of<float>(),
    low_rank_kernels_of<double>(),
#ifdef METALORA_BF16_PRODUCTS
    low_rank_bf16_kernels(),
#else
    low_rank_kernels_of<Bfloat16>(),
#endif
    low_rank_kernels_of<Bfloat16>(),
    {add<float>, add_rows<float>},
    {add<double>, add_rows<double>},
    {add<Bfloat16>, add_rows<Bfloat16>},
    {add_scaled<float>, dot_rows<float>},
    {add_scaled<double>, dot_rows<double>},
    {small_product<float>, small_outer<float>},
    {small_product<double>, small_outer<double>},
    {attention_forward<float>, attention_backward<float>},
    {attention_forward<double>, attention_backward<double>},
    {attention_forward<Bfloat16>, attention_backward<Bfloat16>},
    kept_word,
};

}  // namespace metalora::cpu::METALORA_ISA
