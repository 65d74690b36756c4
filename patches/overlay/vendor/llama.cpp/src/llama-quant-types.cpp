#include "llama-quant-types.h"

#include "llama-arch.h"
#include "llama-cpp.h"
#include "llama-ext.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model-loader.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <vector>

static uint32_t get_u32(const gguf_context * ctx, const std::string & key, uint32_t value) {
    const int64_t id = gguf_find_key(ctx, key.c_str());
    if (id < 0) {
        return value;
    }
    if (gguf_get_kv_type(ctx, id) != GGUF_TYPE_UINT32) {
        throw std::runtime_error(format("%s: expected one u32", key.c_str()));
    }
    return gguf_get_val_u32(ctx, id);
}

static void choose_types(
        const void * header, size_t n_header, const llama_model_quantize_params & params,
        ggml_type * types, ggml_type * wanted, size_t n_tensors) {
    ggml_context * ctx_data = nullptr;

    const gguf_context_ptr file { gguf_init_from_buffer(header, n_header, { /*.no_alloc =*/ true, /*.ctx =*/ &ctx_data }) };
    const ggml_context_ptr ctx  { ctx_data };

    if (!file || (size_t) gguf_get_n_tensors(file.get()) != n_tensors) {
        throw std::runtime_error(format("this is no GGUF header of %zu tensors", n_tensors));
    }
    if (llama_ftype_get_default_type(params.ftype) == GGML_TYPE_COUNT) {
        throw std::runtime_error(format("invalid output file type %d", params.ftype));
    }

    const int64_t     arch_id = gguf_find_key(file.get(), "general.architecture");
    const std::string arch    = arch_id < 0 || gguf_get_kv_type(file.get(), arch_id) != GGUF_TYPE_STRING ? "" : gguf_get_val_str(file.get(), arch_id);
    const LLM_KV      kv(llm_arch_from_string(arch));
    if (kv.arch == LLM_ARCH_UNKNOWN) {
        throw std::runtime_error(format("unknown model architecture: '%s'", arch.c_str()));
    }

    llama_quant_model_desc desc = {};
    desc.architecture = arch.c_str();
    desc.n_embd       = get_u32(file.get(), kv(LLM_KV_EMBEDDING_LENGTH),        0);
    desc.n_layer      = get_u32(file.get(), kv(LLM_KV_BLOCK_COUNT),             0);
    desc.n_expert     = get_u32(file.get(), kv(LLM_KV_EXPERT_COUNT),            0);
    desc.n_head       = get_u32(file.get(), kv(LLM_KV_ATTENTION_HEAD_COUNT),    0);
    desc.n_head_kv    = get_u32(file.get(), kv(LLM_KV_ATTENTION_HEAD_COUNT_KV), desc.n_head);
    if (desc.n_layer == 0 || desc.n_layer > LLAMA_MAX_LAYERS) {
        throw std::runtime_error(format("block_count = %u, expected 1 to %d", desc.n_layer, LLAMA_MAX_LAYERS));
    }

    const llama_model_ptr model { llama_quant_model_from_metadata(&desc) };
    const std::unique_ptr<quantize_state_impl, decltype(&llama_quant_free)> state { llama_quant_init(model.get(), &params), llama_quant_free };

    // the quantizer's order, which some levels depend on
    std::vector<size_t> order(n_tensors);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
        return llama_model_loader::weight_name_comparer()(gguf_get_tensor_name(file.get(), a), gguf_get_tensor_name(file.get(), b));
    });

    std::vector<ggml_tensor *> tensors;
    for (const size_t i : order) {
        tensors.push_back(ggml_get_tensor(ctx.get(), gguf_get_tensor_name(file.get(), i)));
    }
    std::vector<ggml_type> result(n_tensors);
    std::vector<ggml_type> from  (n_tensors);
    llama_quant_compute_types(state.get(), params.ftype, tensors.data(), result.data(), n_tensors, from.data());

    for (size_t i = 0; i < n_tensors; ++i) {
        types [order[i]] = result[i];
        wanted[order[i]] = from[i];
    }
}

bool llama_quant_choose_types(
        const void * header, size_t n_header, const llama_model_quantize_params * params,
        ggml_type * types, ggml_type * wanted, size_t n_tensors, char * error, size_t n_error) {
    try {
        choose_types(header, n_header, *params, types, wanted, n_tensors);
        return true;
    } catch (const std::exception & err) {
        snprintf(error, n_error, "%s", err.what());
        return false;
    }
}
