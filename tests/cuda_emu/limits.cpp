// Calls the launchers with more than a launch can have, on views that need no memory: the tests hold them to an error.
// Sizes are such that a conversion to 32 bits would leave a small launch.
#include <cstdio>
#include <exception>
#include <functional>
#include <map>
#include <string>

#include "pyvidx/bank_attention.h"
#include "pyvidx/gated_fusion.h"
#include "pyvidx/memory_merge.h"
#include "pyvidx/memory_scan.h"
#include "pyvidx/quick_gelu.h"
#include "pyvidx/residual_norm.h"
#include "pyvidx/resize_normalize.h"
#include "pyvidx/st_pool.h"
#include "pyvidx/temporal_attention.h"
#include "pyvidx/temporal_scale.h"
#include "pyvidx/token_gather.h"

namespace pyvidx {
namespace {

// Enough for what one small launch would read and write.
alignas(64) char memory[1 << 16];

// All rows are the same one.
template <typename... Size>
View<int(sizeof...(Size))> rows(Size... sizes) {
  View<int(sizeof...(Size))> v;
  v.data = memory;
  int i = 0;
  ((v.size[i++] = int64_t(sizes)), ...);
  v.stride[sizeof...(Size) - 1] = 1;
  return v;
}

constexpr int64_t kWrap = int64_t(1) << 32, kMany = kWrap + 1;  // the latter is 1 in 32 bits
constexpr int C = 8;

BankAttentionInput bank_input(int64_t B, int64_t t, int64_t n) {
  return {rows(B, t, n, C), rows(B, 1, 1, 2 * C), {}, {}, {}, 1, 1.0};
}

const std::map<std::string, std::function<void()>> kCalls = {
    {"temporal_attention",
     [] { temporal_attention_cuda({rows(4 * kMany, 1, 1, 3, 1, C), rows(4 * kMany, 1, 1, 1, C), 1}, {}); }},
    {"temporal_attention of frames",
     [] { temporal_attention_cuda({rows(1, kMany, 1, 3, 1, C), rows(1, kMany, 1, 1, C), 1}, {}); }},
    {"temporal_attention of channels",
     [] { temporal_attention_cuda({rows(1, 1, 1, 3, 1, kMany), rows(1, 1, 1, 1, kMany), 1}, {}); }},
    {"temporal_attention_backward",
     [] {
       temporal_attention_backward_cuda(
           {rows(4 * kMany, 1, 1, 1, C), rows(4 * kMany, 1, 1, 3, 1, C), rows(4 * kMany, 1, 1, 3, 1, C), 1}, {});
     }},
    {"temporal_attention_backward of frames",
     [] {
       temporal_attention_backward_cuda({rows(1, 129, 1, 1, C), rows(1, 129, 1, 3, 1, C), rows(1, 129, 1, 3, 1, C), 1},
                                        {});
     }},
    {"token_gather",
     [] { token_gather_cuda({rows(1, 1, 1, C), rows(1, 8, kMany), {}, {}, rows(1, 8, kMany, C), false}, {}); }},
    {"token_gather_backward",
     [] { token_gather_backward_cuda({rows(1, 1, 1, C), rows(1, 8, kMany), rows(1, 8, kMany, C)}, {}); }},
    {"bank_attention",
     [] { bank_attention_cuda({bank_input(kMany, 1, 1), rows(kMany, 1, 1, C), {}, rows(kMany, 1, 64)}, {}); }},
    {"bank_attention of queries",
     [] { bank_attention_cuda({bank_input(1, 1, kMany), rows(1, 1, kMany, C), {}, rows(1, 1, 64)}, {}); }},
    {"bank_attention_backward",
     [] {
       bank_attention_backward_cuda({bank_input(kMany, 1, 1),
                                     rows(kMany, 1, 1, C),
                                     rows(kMany, 1, 1, C),
                                     rows(kMany, 1, 1, 1),
                                     rows(kMany, 1, 1, 64),
                                     {},
                                     rows(kMany, 1, 64),
                                     rows(kMany, 1, 1, C),
                                     {}},
                                    {});
     }},
    {"bank_attention_backward of rows",
     [] {
       bank_attention_backward_cuda({bank_input(kMany, 0, 1),
                                     rows(kMany, 0, 1, C),
                                     rows(kMany, 0, 1, C),
                                     rows(kMany, 0, 1, 1),
                                     rows(kMany, 0, 1, 64),
                                     {},
                                     rows(0, 1, 64),
                                     rows(kMany, 0, 1, C),
                                     rows(kMany, 1, 1, 2 * C)},
                                    {});
     }},
    {"memory_step",
     [] {
       memory_step_cuda({rows(kMany, 2, 1, C),
                         rows(kMany, 1, 2),
                         rows(kMany, 1, 2),
                         rows(kMany, 1, 1),
                         rows(kMany),
                         rows(kMany, 1, C),
                         {},
                         rows(kMany, 1),
                         nullptr,
                         0,
                         true},
                        {});
     }},
    {"memory_merge",
     [] {
       memory_merge_cuda(
           {rows(kMany, 2, 1, C), rows(kMany, 2, 1), rows(kMany, 1, 1, C), rows(kMany, 1, 1), rows(kMany, 1), true},
           {});
     }},
    {"memory_merge_backward",
     [] {
       memory_merge_backward_cuda({rows(kMany, 1, 1, C), rows(kMany, 2, 1), rows(kMany, 1), rows(kMany, 2, 1, C), true},
                                  {});
     }},
    {"memory_scan",
     [] {
       memory_scan_cuda({rows(kMany, 2, 1, C),
                         rows(kMany, 1, 2),
                         rows(kMany, 1, 2),
                         rows(kMany, 1, 1),
                         rows(kMany),
                         rows(kMany, 1, 1, C),
                         {},
                         rows(kMany, 1, 1, 2),
                         rows(kMany, 1, 1, 2),
                         rows(kMany, 1, 1, 2),
                         true},
                        {});
     }},
    {"memory_replay",
     [] {
       memory_replay_cuda({rows(kMany, 2, 1, C), rows(kMany, 1, 1, C), rows(kMany, 1, 1, 2), rows(kMany, 1, 1, 2),
                           rows(kMany, 1, 1, 2), rows(kMany, 1, 2), rows(kMany, 4, 1, C), true},
                          {});
     }},
    {"memory_replay of channels",
     [] {
       memory_replay_cuda({rows(1, 2, 1, kWrap * 1024), rows(1, 1, 1, kWrap * 1024), rows(1, 1, 1, 2), rows(1, 1, 1, 2),
                           rows(1, 1, 1, 2), rows(1, 1, 2), rows(1, 4, 1, kWrap * 1024), true},
                          {});
     }},
    {"quick_gelu", [] { quick_gelu_cuda({rows(kWrap * 1024 + 4), rows(kWrap * 1024 + 4)}, {}); }},
    {"quick_gelu_backward",
     [] { quick_gelu_backward_cuda({rows(kWrap * 1024 + 4), rows(kWrap * 1024 + 4), rows(kWrap * 1024 + 4)}, {}); }},
    {"residual_norm",
     [] {
       ResidualNormArgs a{};
       a.x = a.y = a.out = a.normed = rows(4 * kMany, 1, 1, C);
       a.stats = rows(4 * kMany, 1, 1, 2), a.weight = a.shift = rows(C);
       residual_norm_cuda(a, {});
     }},
    {"residual_norm of classes",
     [] {
       ResidualNormArgs a{};
       a.x = a.y = a.out = a.normed = rows(kMany, 1, 0, C);
       a.stats = rows(kMany, 1, 0, 2), a.weight = a.shift = rows(C), a.cls = rows(kMany, C);
       a.out_cls = a.normed_cls = rows(kMany, 1, C), a.stats_cls = rows(kMany, 1, 2);
       residual_norm_cuda(a, {});
     }},
    {"residual_norm_backward",
     [] {
       ResidualNormBackwardArgs a{};
       a.grad_out = a.grad_normed = a.value = a.grad_x = rows(kMany, 1, 1, C);
       a.stats = rows(kMany, 1, 1, 2), a.weight = a.grad_weight = a.grad_shift = rows(C);
       a.partial = rows(2, kMany, C);
       residual_norm_backward_cuda(a, {});
     }},
    {"residual_norm_backward of classes",
     [] {
       ResidualNormBackwardArgs a{};
       a.grad_out = a.grad_normed = a.value = a.grad_x = rows(kMany, 1, 0, C);
       a.stats = rows(kMany, 1, 0, 2), a.weight = a.grad_weight = a.grad_shift = rows(C);
       a.grad_out_cls = a.grad_normed_cls = a.value_cls = a.grad_cls = rows(kMany, 1, C),
       a.stats_cls = rows(kMany, 1, 2);
       a.partial = rows(2, kMany, C);
       residual_norm_backward_cuda(a, {});
     }},
    {"st_pool",
     [] {
       st_pool_cuda({rows(8 * kMany, 1, 1, C),
                     {},
                     rows(8 * kMany, 1, C),
                     rows(8 * kMany, 1, C),
                     {},
                     rows(8 * kMany, 1, 1, C),
                     1},
                    {});
     }},
    {"st_pool_backward",
     [] { st_pool_backward_cuda({rows(kMany, 1, C), rows(kMany, 1, C), {}, rows(kMany, 1, 1, C)}, {}); }},
    {"temporal_scale",
     [] { temporal_scale_cuda({rows(kMany, 1, 1, C), rows(C, 3), {}, {}, {}, rows(kMany, 1, 1, C), {}}, {}); }},
    {"temporal_scale of channels",
     [] { temporal_scale_cuda({rows(1, 1, 1, kMany), rows(kMany, 3), {}, {}, {}, rows(1, 1, 1, kMany), {}}, {}); }},
    {"temporal_scale_backward",
     [] {
       temporal_scale_backward_cuda({rows(kMany, 1, 1, C), {}, rows(C, 3), {}, rows(kMany, 1, 1, C), {}, {}, {}, {}},
                                    {});
     }},
    {"resize_normalize",
     [] {
       ResizeNormalizeArgs a{};
       a.frames = rows(8 * kMany, 1, 1, 3), a.out = rows(8 * kMany, 3, 1, 1), a.h = a.w = 1;
       a.rows = a.columns = rows(1, 5);
       resize_normalize_cuda(a, {});
     }},
    {"gated_fusion",
     [] {
       GatedFusionArgs a{};
       a.x = a.z = a.out = rows(kMany, 1, 1, C), a.x_cls = rows(kMany, 1, C), a.cls = a.out_cls = rows(kMany, C);
       a.scale = 1, a.eps = 1e-5;
       gated_fusion_cuda(a, {});
     }},
    {"gated_fusion of classes",
     [] {
       GatedFusionArgs a{};
       a.x = a.z = a.out = rows(kMany, 1, 0, C), a.x_cls = rows(kMany, 1, C), a.cls = a.out_cls = rows(kMany, C);
       a.scale = 1, a.eps = 1e-5;
       gated_fusion_cuda(a, {});
     }},
    {"gated_fusion of tokens",
     [] {
       GatedFusionArgs a{};
       a.x = rows(1, kMany, 1, C), a.z = a.out = rows(1, 1, 1, C), a.x_cls = rows(1, 1, C),
       a.cls = a.out_cls = rows(1, C);
       a.keep = rows(1, 1, 1);
       gated_fusion_cuda(a, {});
     }},
    {"gated_fusion_backward",
     [] {
       GatedFusionBackwardArgs a{};
       a.grad_out = a.value = a.x = a.z = a.grad_z = rows(kMany, 1, 1, C), a.grad_out_cls = rows(kMany, C);
       a.x_cls = rows(kMany, 1, C), a.cls = rows(kMany, C), a.grad_cls = rows(kMany, 1, C), a.parts = kMany;
       gated_fusion_backward_cuda(a, {});
     }},
};

}  // namespace
}  // namespace pyvidx

#define EXPORT extern "C" __attribute__((visibility("default")))

// The names, one after another with newlines between them.
EXPORT const char* pyvidx_limits() {
  static const std::string names = [] {
    std::string all;
    for (const auto& call : pyvidx::kCalls) all += (all.empty() ? "" : "\n") + call.first;
    return all;
  }();
  return names.c_str();
}

// Returns 0 if the launcher took it, or 1 and its message.
EXPORT int pyvidx_exceed(const char* name, char* message, size_t size) {
  try {
    pyvidx::kCalls.at(name)();
  } catch (const std::exception& error) {
    std::snprintf(message, size, "%s", error.what());
    return 1;
  }
  return 0;
}
