#pragma once

#include "llama.h"

#include "ggml.h"

extern "C" {

// What llama_model_quantize would store each tensor as.
//
// header  a GGUF file, or as much of it as comes before the tensor data
// types   of each tensor, in the file's order
// wanted  the type that a tensor should have, where its rows cannot hold that; else GGML_TYPE_COUNT
// error   why not, if false is returned; cut to n_error bytes
LLAMA_API bool llama_quant_choose_types(
        const void * header,
        size_t       n_header,
        const struct llama_model_quantize_params * params,
        enum ggml_type * types,
        enum ggml_type * wanted,
        size_t           n_tensors,
        char           * error,
        size_t           n_error);

}
