#include "llama-model-experts.h"

#include "llama-ext.h"
#include "llama-impl.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <optional>

// only what the user asks for counts, not what a file says
static const llama_model_kv_override * find_override(const llama_model_loader & ml, const char * name, llama_model_kv_override_type tag) {
    const auto it = ml.kv_overrides.find(ml.get_arch_name() + "." + name);
    if (it == ml.kv_overrides.end()) {
        return nullptr;
    }
    if (it->second.tag != tag) {
        throw std::runtime_error(format("override '%s' must be %s", it->first.c_str(),
                tag == LLAMA_KV_OVERRIDE_TYPE_INT   ? "an integer" :
                tag == LLAMA_KV_OVERRIDE_TYPE_FLOAT ? "a number"   : "a boolean"));
    }
    return &it->second;
}

static std::optional<uint64_t> override_int(const llama_model_loader & ml, const char * name) {
    const auto * found = find_override(ml, name, LLAMA_KV_OVERRIDE_TYPE_INT);
    if (found && found->val_i64 < 0) {
        throw std::runtime_error(format("override '%s' is negative", found->key));
    }
    return found ? std::optional<uint64_t>(found->val_i64) : std::nullopt;
}

int64_t llama_model_experts::row_size(const llama_model_loader & ml, llm_arch arch, int layer, int64_t n_ff) {
    const ggml_tensor * t = ml.get_tensor_meta(LLM_TN(arch)(LLM_TENSOR_FFN_DOWN_EXPS, "weight", layer).str().c_str());
    const int64_t n_row = GGML_PAD(n_ff, (int64_t) 256); // the blocks of all K- and IQ-quants that have large ones

    return t && t->ne[0] == n_row ? n_row : n_ff;
}

std::shared_ptr<llama_model_experts> llama_model_experts::load(
        llama_model_loader & ml, llama_model & model, const std::vector<int> & pool_layers, bool use_extra_bufts) {
    const auto & hparams = model.hparams;
    const auto   tn      = LLM_TN(model.arch);

    const auto max_bytes = override_int(ml, "expert_cache");
    if (!max_bytes) {
        return nullptr;
    }
    if (ml.files.empty()) {
        throw std::runtime_error("an expert cache needs a model that lies in a file");
    }
    if (model.n_devices() > 0 && model.n_gpu_layers() > 0) {
        throw std::runtime_error(format("an expert cache works on the CPU only, and %u layers were to be on a GPU: "
                "load with n_gpu_layers = 0, or without the cache", model.n_gpu_layers()));
    }

    const auto * direct_io = find_override(ml, "expert_cache.direct", LLAMA_KV_OVERRIDE_TYPE_BOOL);
    const auto * margin    = find_override(ml, "expert_cache.margin", LLAMA_KV_OVERRIDE_TYPE_FLOAT);
    if (margin && !(margin->val_f64 >= 0.0 && std::isfinite(margin->val_f64))) {
        throw std::runtime_error(format("override '%s' is %g, expected 0 or more", margin->key, margin->val_f64));
    }

    llama_expert_store::params params;
    params.n_expert        = hparams.n_expert;
    params.max_bytes       = *max_bytes;
    params.min_slots       = hparams.n_expert_used_max();
    params.n_threads       = override_int(ml, "expert_cache.threads").value_or(0);
    params.direct_io       = !direct_io || direct_io->val_bool;
    params.use_extra_bufts = use_extra_bufts;

    for (const auto & file : ml.files) {
        params.files.push_back(file->file_id());
    }

    std::map<int, int> pools; // by layer
    std::vector<int>   steps(pool_layers.size(), -1);
    for (size_t i = 0; i < pool_layers.size(); ++i) {
        const int il = pool_layers[i];
        if (il < 0) {
            continue;
        }
        if (pools.emplace(il, (int) params.pools.size()).second) {
            const int64_t n_embd   = hparams.n_embd;
            const int64_t n_ff     = hparams.n_ff_exp(il);
            const int64_t n_row    = row_size(ml, model.arch, il, n_ff);
            const int64_t n_expert = hparams.n_expert;

            auto & parts = params.pools.emplace_back();
            for (const auto tensor : { LLM_TENSOR_FFN_GATE_EXPS, LLM_TENSOR_FFN_UP_EXPS, LLM_TENSOR_FFN_DOWN_EXPS }) {
                const bool is_down = tensor == LLM_TENSOR_FFN_DOWN_EXPS;
                const std::string name = tn(tensor, "weight", il).str();

                const ggml_tensor * t = ml.check_tensor_dims(name, { is_down ? n_row : n_embd, is_down ? n_embd : n_ff, n_expert }, true, false);
                if (t->type == GGML_TYPE_NVFP4 || (t->type != GGML_TYPE_F32 && !ggml_get_type_traits(t->type)->to_float)) {
                    throw std::runtime_error(format("an expert cache does not hold weights of type %s", ggml_type_name(t->type)));
                }
                const auto & weight = ml.require_weight(name.c_str());
                parts.push_back({ t->type, t->ne[0], t->ne[1], weight.idx, weight.offs });

                ml.n_created++;
                ml.size_data -= ggml_nbytes(t);
            }
        }
        steps[i] = (int) params.steps.size();
        params.steps.push_back(pools.at(il));
    }

    auto ret = std::make_shared<llama_model_experts>(params, std::move(steps), margin ? (float) margin->val_f64 : 0.0f);

    for (const auto & [il, pool] : pools) {
        model.layers[il].ffn_gate_exps = ret->store.weights(pool, 0);
        model.layers[il].ffn_up_exps   = ret->store.weights(pool, 1);
        model.layers[il].ffn_down_exps = ret->store.weights(pool, 2);
    }

    // a mapping would be read ahead, experts and all
    ml.use_mmap = false;

    LLAMA_LOG_INFO("%s: memory for %d of %zu experts, %.2f MiB each\n", __func__,
            ret->store.n_slots(), params.n_expert*params.pools.size(), ret->store.slot_bytes()/1024.0/1024.0);

    return ret;
}

// that one layer may use for so many tokens
static int n_experts_at_once(const llama_hparams & hparams, int64_t n_tokens) {
    return (int) std::min<int64_t>(hparams.n_expert, n_tokens*hparams.n_expert_used_max());
}

//
// interface
//

bool llama_model_expert_store_stats(const llama_model * model, llama_expert_store_stats * stats) {
    if (!model->experts) {
        return false;
    }
    *stats = model->experts->store.stats();
    return true;
}

bool llama_model_expert_store_resize(llama_model * model, uint64_t bytes, uint32_t n_ubatch) {
    return model->experts && model->experts->store.resize(bytes, n_experts_at_once(model->hparams, n_ubatch));
}

static thread_local std::string last_error;

const char * llama_model_expert_store_error(const llama_model * model) {
    return model->experts ? last_error.c_str() : "";
}

uint64_t llama_context_compute_bytes(const llama_context * ctx) {
    uint64_t ret = 0;
    for (const auto & [buft, data] : llama_get_memory_breakdown(ctx)) {
        ret += data.compute;
    }
    return ret;
}

//
// graph
//

llm_graph_input_experts::llm_graph_input_experts(const llama_model & model, int64_t n_tokens) :
    experts(*model.experts), n_tokens(n_tokens), run(model.experts->store) {
    const auto & store = model.experts->store;

    const int64_t n_needed = n_experts_at_once(model.hparams, n_tokens);
    if (n_needed > store.n_reserved()) {
        throw std::runtime_error(format("a batch of %lld tokens can use %lld experts at once, and the expert cache holds %d: "
                "make it %llu bytes, or n_ubatch %lld at most", (long long) n_tokens, (long long) n_needed, store.n_reserved(),
                (unsigned long long) (n_needed*store.slot_bytes()), (long long) (store.n_reserved()/model.hparams.n_expert_used_max())));
    }
    ops.reserve(experts.steps.size());
}

static std::vector<int32_t> to_vector(const ggml_tensor * ids) {
    std::vector<int32_t> ret(ids->ne[0]*ids->ne[1]);
    for (int64_t i = 0; i < ids->ne[1]; ++i) {
        memcpy(ret.data() + i*ids->ne[0], (const char *) ids->data + i*ids->nb[1], ids->ne[0]*sizeof(int32_t));
    }
    return ret;
}

ggml_tensor * llm_graph_input_experts::prefer(ggml_context * ctx, ggml_tensor * after, int il) {
    const int64_t n_expert = after->ne[0];
    return build(ctx, GGML_TYPE_F32, n_expert, 1, { after }, 1, il, [](ggml_tensor * dst, int ith, int, void * userdata) {
        if (ith == 0) {
            const auto * op = (const struct op *) userdata;
            const auto held = op->experts->store.holds(op->step);
            std::transform(held.begin(), held.end(), (float *) dst->data, [&](bool is_held) { return is_held ? op->experts->margin : 0.0f; });
        }
    });
}

ggml_tensor * llm_graph_input_experts::announce(ggml_context * ctx, ggml_tensor * ids, int il) {
    return build(ctx, GGML_TYPE_I32, 1, 1, { ids }, 1, il, [](ggml_tensor * dst, int ith, int, void * userdata) {
        if (ith == 0) {
            const auto * op = (const struct op *) userdata;
            op->run->announce(op->step, to_vector(dst->src[0]));
        }
    });
}

ggml_tensor * llm_graph_input_experts::acquire(ggml_context * ctx, ggml_tensor * ids, ggml_tensor * cur, int il) {
    return build(ctx, GGML_TYPE_I32, ids->ne[0], ids->ne[1], { ids, cur }, GGML_N_TASKS_MAX, il, [](ggml_tensor * dst, int ith, int, void * userdata) {
        const auto * op = (const struct op *) userdata;
        if (ith == 0) {
            const auto slots = op->run->acquire(op->step, to_vector(dst->src[0]));
            std::copy(slots.begin(), slots.end(), (int32_t *) dst->data);
        } else {
            op->run->assist(op->step);
        }
    });
}

ggml_tensor * llm_graph_input_experts::build(ggml_context * ctx, ggml_type type, int64_t ne0, int64_t ne1, std::vector<ggml_tensor *> args, int n_tasks, int il, ggml_custom_op_t fun) {
    ops.push_back(std::make_unique<op>(op { &experts, &run, experts.steps.at(il) }));
    return ggml_custom_4d(ctx, type, ne0, ne1, 1, 1, args.data(), (int) args.size(), fun, n_tasks, ops.back().get());
}

void llm_graph_input_experts::set_input(const llama_ubatch *) {
    run.begin();
}

bool llm_graph_input_experts::can_reuse(const llm_graph_params &) {
    return true;
}

bool llm_graph_input_experts::done() {
    const std::string error = run.end();
    last_error = error;
    if (!error.empty()) {
        LLAMA_LOG_ERROR("%s: cannot load experts: %s\n", __func__, error.c_str());
    }
    return error.empty();
}
