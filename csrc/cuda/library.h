// The operators' namespace and dispatch key; tests/shim has its own, to stand beside these.
#pragma once

#ifndef METALORA_LIBRARY
#define METALORA_LIBRARY metalora
#define METALORA_KEY CUDA
#endif
