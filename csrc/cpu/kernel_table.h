// All loop bodies, for the Vec and CPREC_ISA that the including file has set, and their table in CpuKernels' order.
#pragma once

#include "cpu/block_embedding.h"
#include "cpu/block_embedding_backward.h"
#include "cpu/clustered_softmax.h"
#include "cpu/conv_norm_relu.h"
#include "cpu/dropout.h"
#include "cpu/residual_stack.h"
#include "cpu/roofline.h"
#include "cpu/row_optimizer.h"
#include "cpu/softmax_count.h"
#include "cpu/topk_index.h"
#include "cprec/cpu.h"

#define CPREC_KERNEL_TABLE(name)                   \
  {                                                \
      name,                                        \
      cprec::CPREC_ISA::block_embedding,           \
      cprec::CPREC_ISA::block_embedding_groups,    \
      cprec::CPREC_ISA::block_embedding_workspace, \
      cprec::CPREC_ISA::embedding_grad_pack,       \
      cprec::CPREC_ISA::embedding_grad,            \
      cprec::CPREC_ISA::embedding_grad_merge,      \
      cprec::CPREC_ISA::embedding_grad_workspace,  \
      cprec::CPREC_ISA::zero_fill,                 \
      cprec::CPREC_ISA::softmax_pack,              \
      cprec::CPREC_ISA::softmax_lse,               \
      cprec::CPREC_ISA::softmax_target_logits,     \
      cprec::CPREC_ISA::softmax_logits,            \
      cprec::CPREC_ISA::softmax_count,             \
      cprec::CPREC_ISA::softmax_project,           \
      cprec::CPREC_ISA::softmax_grad,              \
      cprec::CPREC_ISA::softmax_lse_workspace,     \
      cprec::CPREC_ISA::softmax_grad_workspace,    \
      cprec::CPREC_ISA::index_pack,                \
      cprec::CPREC_ISA::index_scan,                \
      cprec::CPREC_ISA::index_logits,              \
      cprec::CPREC_ISA::index_leaves,              \
      cprec::CPREC_ISA::index_look,                \
      cprec::CPREC_ISA::index_cut,                 \
      cprec::CPREC_ISA::index_at_least,            \
      cprec::CPREC_ISA::index_mark,                \
      cprec::CPREC_ISA::residual_stack,            \
      cprec::CPREC_ISA::residual_stack_workspace,  \
      cprec::CPREC_ISA::norm_relu,                 \
      cprec::CPREC_ISA::norm_relu_grad,            \
      cprec::CPREC_ISA::dropout,                   \
      cprec::CPREC_ISA::row_adamw,                 \
      cprec::CPREC_ISA::row_adagrad,               \
      cprec::CPREC_ISA::row_scale,                 \
      cprec::CPREC_ISA::probe_fma,                 \
      cprec::CPREC_ISA::probe_bf16,                \
      cprec::CPREC_ISA::probe_exp2,                \
      cprec::CPREC_ISA::probe_read,                \
  }
