#pragma once

// Megrez2 (arXiv 2507.17728): a mixture-of-experts decoder in which
//  - a group of consecutive layers shares one pool of routed experts, stored with the group's first layer, and
//  - the router of a layer reads the *previous* layer's normalised FFN input (pre-gating), so a layer's experts are
//    known before the previous layer's FFN and its own attention run.
// Each layer keeps its own router, selection bias and shared experts. Included from models.h.

struct llama_model_megrez_moe : public llama_model_base {
    llama_model_megrez_moe(const struct llama_model_params & params) : llama_model_base(params) {}
    void load_arch_hparams(llama_model_loader & ml) override;
    void load_arch_tensors(llama_model_loader & ml) override;

    bool is_moe    (int il) const; // routes to experts, as opposed to a dense FFN
    int  pool_layer(int il) const; // the layer whose tensors hold the experts of il

    struct graph : public llm_graph_context {
        graph(const llama_model_megrez_moe & model, const llm_graph_params & params);

    private:
        struct routing {
            ggml_tensor * ids;     // I32 [n_expert_used, n_tokens]
            ggml_tensor * weights; // F32 [1, n_expert_used, n_tokens]
        };

        routing       build_routing(const llama_layer & layer, ggml_tensor * h, int il);
        ggml_tensor * build_experts(const llama_layer & pool, const routing & route, ggml_tensor * cur, int il);
        ggml_tensor * build_mlp(
                ggml_tensor * gate, ggml_tensor * gate_s,
                ggml_tensor * up,   ggml_tensor * up_s,
                ggml_tensor * down, ggml_tensor * down_s, ggml_tensor * cur, int il);
    };

    std::unique_ptr<llm_graph_context> build_arch_graph(const llm_graph_params & params) const override;
};
