#include "llama-expert-counts.h"

#include "llama-impl.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include <algorithm>

std::shared_ptr<llama_expert_counts> llama_expert_counts::load(
        const llama_model_loader & ml, const llama_model & model, const std::vector<int> & pool_layers) {
    const auto it = ml.kv_overrides.find(ml.get_arch_name() + ".expert_counts");
    if (it == ml.kv_overrides.end()) {
        return nullptr;
    }
    if (it->second.tag != LLAMA_KV_OVERRIDE_TYPE_BOOL) {
        throw std::runtime_error(format("override '%s' must be a boolean", it->first.c_str()));
    }
    const bool is_on_gpu = model.n_devices() > 0 && model.n_gpu_layers() > 0;
    if (!it->second.val_bool || is_on_gpu) {
        return nullptr;
    }
    const auto & hparams = model.hparams;
    return std::make_shared<llama_expert_counts>(pool_layers, hparams.n_expert, hparams.n_expert_used_max());
}

llama_expert_counts::llama_expert_counts(const std::vector<int> & pool_layers, int n_expert, int n_used) : n_used(n_used) {
    for (const int pool : pool_layers) {
        layers.push_back({ pool, std::vector<std::atomic<uint64_t>>(pool < 0 ? 0 : n_expert) });
    }
}

ggml_tensor * llama_expert_counts::count(ggml_context * ctx, ggml_tensor * ids, int il) {
    if (ids->ne[0] != n_used) {
        return ids;
    }
    const auto fun = [](ggml_tensor * dst, int, int, void * userdata) {
        auto & counts = ((layer *) userdata)->counts;
        const ggml_tensor * ids = dst->src[0];
        for (int64_t i = 0; i < ids->ne[1]; ++i) {
            const auto * row = (const int32_t *) ((const char *) ids->data + i*ids->nb[1]);
            for (int64_t j = 0; j < ids->ne[0]; ++j) {
                counts[row[j]].fetch_add(1, std::memory_order_relaxed);
            }
        }
    };
    return ggml_custom_4d(ctx, GGML_TYPE_I32, 1, 1, 1, 1, &ids, 1, fun, 1, &layers.at(il));
}

uint32_t llama_expert_counts::get(int il, uint64_t * counts, uint32_t n_counts, int32_t * pool) const {
    if (il < 0 || il >= (int) layers.size()) {
        return 0;
    }
    const auto & cur = layers[il];
    std::copy_n(cur.counts.begin(), std::min<size_t>(cur.counts.size(), n_counts), counts);
    *pool = cur.pool;
    return (uint32_t) cur.counts.size();
}

uint32_t llama_model_expert_counts(const llama_model * model, int32_t il, uint64_t * counts, uint32_t n_counts, int32_t * pool) {
    return model->expert_counts ? model->expert_counts->get(il, counts, n_counts, pool) : 0;
}
