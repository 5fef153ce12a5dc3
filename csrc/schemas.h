// Every operator's schema on one screen. Shapes, the mathematics and the meaning of each argument:
// metalora/reference.
#pragma once

namespace metalora {

template <typename Library>
void define_operators(Library& m) {
  // The two routes of lora_linear. `merged` [T, out, in] are the W_t where they are at hand; with
  // `tf32` the GPU's products may round factors to TF32. `shrunk` [M, r] is what the token route
  // keeps for backward, with dropout also `kept`: a bit for each element of x, rows padded to 64
  // bits, set where dropout keeps the element. `grad_x` is a gradient that x has already: that of
  // x comes back with it added. Gradients that are not needed come back as empty tensors.
  m.def(
      "lora_linear_weight(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, "
      "Tensor task_ptr, float scaling, Tensor? merged, bool tf32) -> Tensor");
  m.def(
      "lora_linear_weight_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor lora_A, "
      "Tensor lora_B, Tensor task_ptr, float scaling, Tensor? merged, bool tf32, "
      "bool need_x, bool need_weight, bool need_bias, bool need_A, bool need_B) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The same with A_tᵀ = B_t = U_t [T, d, k].
  m.def(
      "lora_linear_symmetric(Tensor x, Tensor weight, Tensor? bias, Tensor lora_U, "
      "Tensor task_ptr, float scaling, Tensor? merged, bool tf32) -> Tensor");
  m.def(
      "lora_linear_symmetric_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor lora_U, "
      "Tensor task_ptr, float scaling, Tensor? merged, bool tf32, "
      "bool need_x, bool need_weight, bool need_bias, bool need_U) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "lora_linear_token(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, "
      "Tensor task_ptr, float scaling, float dropout_p, Tensor? seed, bool tf32) "
      "-> (Tensor y, Tensor shrunk, Tensor kept)");
  m.def(
      "lora_linear_token_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor lora_A, "
      "Tensor lora_B, Tensor task_ptr, Tensor shrunk, Tensor kept, float scaling, float dropout_p, "
      "Tensor? seed, bool tf32, bool need_x, bool need_weight, bool need_bias, bool need_A, "
      "bool need_B, Tensor? grad_x) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  m.def(
      "merge_lora(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, ScalarType? dtype, "
      "bool tf32) -> Tensor");
  m.def(
      "merge_lora_backward(Tensor grad, Tensor lora_A, Tensor lora_B, float scaling, bool tf32) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "merge_lora_symmetric(Tensor weight, Tensor lora_U, ScalarType? dtype, bool tf32) -> Tensor");
  m.def("merge_lora_symmetric_backward(Tensor grad, Tensor lora_U, bool tf32) -> (Tensor, Tensor)");

  m.def("task_matvec(Tensor weight, Tensor x, Tensor? lora_U) -> Tensor");
  m.def(
      "task_matvec_backward(Tensor grad_y, Tensor weight, Tensor x, Tensor? lora_U, "
      "bool need_weight, bool need_x, bool need_U) -> (Tensor, Tensor, Tensor)");

  // Attention within each of several sequences, one behind the other, for CPUs alone; `normaliser`
  // [N, heads] is what is kept for backward. A token sees itself and those before it, `window` in
  // all; with window 0 all of its sequence. softcap 0 leaves the scores as they are.
  m.def(
      "packed_attention(Tensor query, Tensor key, Tensor value, Tensor ends, float scale, "
      "float dropout_p, Tensor? seed, int window, float softcap) -> (Tensor output, "
      "Tensor normaliser)");
  m.def(
      "packed_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor ends, "
      "Tensor normaliser, float scale, float dropout_p, Tensor? seed, int window, float softcap) "
      "-> (Tensor, Tensor, Tensor)");

  m.def("dropout_mask(Tensor seed, float p, int rows, int columns) -> Tensor");

  // Whole trainings of the paper's linear model on sufficient statistics, batched over the first
  // dimension; the last result of each is the step at which a training diverged, or 0.
  m.def(
      "linear_lora_ml(Tensor gram, Tensor cross, Tensor energy, Tensor weight, "
      "Tensor factors, int count, int outer_steps, int inner_steps, float outer_lr, "
      "float inner_lr) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_standard(Tensor gram, Tensor cross, Tensor energy, Tensor weight, "
      "int count, int steps, float lr) -> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_finetune_lora(Tensor gram, Tensor cross, Tensor energy, Tensor weight, "
      "Tensor factor_u, Tensor factor_v, Tensor? truth, int count, int steps, float lr) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // The same for the shallow network, with AdamW on its samples.
  m.def(
      "shallow_retrain(Tensor x, Tensor y, Tensor weight, Tensor output, Tensor? lora_A, "
      "Tensor? lora_B, int epochs, float lr, float beta1, float beta2, float eps, "
      "float weight_decay) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "shallow_finetune_lora(Tensor x, Tensor y, Tensor weight, Tensor output, Tensor lora_A, "
      "Tensor lora_B, int epochs, float lr, float beta1, float beta2, float eps, "
      "float weight_decay) -> (Tensor, Tensor, Tensor, Tensor)");
}

}  // namespace metalora
