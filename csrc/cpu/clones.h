// Marks a function to be compiled twice, for the baseline instruction set and for AVX2 + FMA; the
// loader picks at run time, so one build is fast everywhere. Templates go in always-inline helpers.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define METALORA_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define METALORA_CLONES
#endif
#define METALORA_INLINE inline __attribute__((always_inline))
