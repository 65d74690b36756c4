// Control tokens that a client spells in its messages stay text.
//
// A template renders a conversation to one string, in which the control tokens of the template and those that
// somebody typed look the same. So before it renders, a private character stands for the first character of every
// control token spelled in what the client sent. Afterwards the prompt is cut at the control tokens that are left,
// which are the template's own.

#pragma once

#include "chat.h"

#include <bitset>
#include <cstdint>
#include <string>
#include <vector>

struct common_chat_prompt_part {
    std::string text;
    bool        special; // the text of one token, otherwise text in which no control token is meant
};

// the tokens of a vocabulary that separate turns; holds no pointer into the model
struct common_chat_special_texts {
    struct item {
        std::string text;
        bool        user_defined; // read from plain text too, unlike a control token
    };

    std::vector<item> items; // the longest first
    std::bitset<256>  first_bytes;

    common_chat_special_texts() = default;
    // of the user-defined tokens, those that the source of the template spells
    common_chat_special_texts(const llama_vocab * vocab, const std::string & template_source);

    // the longest that begins at pos; with cut, also one that the end of the text cuts off
    const item * at(const std::string & text, size_t pos, bool cut = false) const;
};

class common_chat_veil {
  public:
    // covers the control tokens in the inputs
    common_chat_veil(const common_chat_special_texts & special, common_chat_templates_inputs & inputs);

    bool covers() const { return n_covered > 0; }

    std::vector<common_chat_prompt_part> split(const std::string & prompt) const;

    std::string lifted(const std::string & text) const;

  private:
    std::string covered(const std::string & text);
    std::string over(const common_chat_special_texts::item & item) const;

    const common_chat_special_texts & special;
    std::vector<std::string>          firsts; // the first characters of the tokens
    uint32_t                          base = 0;
    size_t                            n_covered = 0;
};

llama_tokens common_chat_tokenize(const llama_vocab * vocab, const std::vector<common_chat_prompt_part> & parts);
