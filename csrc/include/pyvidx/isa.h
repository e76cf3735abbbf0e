// The instruction-set level that the CPU kernels run at.
#pragma once

namespace pyvidx {

// baseline: x86-64-v2, or plain code of another architecture. v4bf16: x86-64-v4 with AVX512_BF16 (Zen 4, Sapphire
// Rapids).
enum class Isa : int { baseline, v3, v4, v4bf16 };

// The best level of this CPU, or the one PYVIDX_ISA (v2, v3, v4, v4bf16) names. Read once.
// Throws std::runtime_error if PYVIDX_ISA names a level that is unknown or that this CPU lacks.
Isa isa();
const char* isa_name(Isa level);

}  // namespace pyvidx
