#include "chat-veil.h"

#include "common.h"
#include "json.h"
#include "unicode.h"

#include <algorithm>
#include <functional>
#include <stdexcept>

static constexpr uint32_t PRIVATE_FIRST = 0xF0000;
static constexpr uint32_t PRIVATE_LAST  = 0x10FFFD;

// the size in bytes of the character that begins at pos
static size_t char_size(const std::string & text, size_t pos) {
    size_t end = pos + 1;
    while (end < text.size() && (text[end] & 0xC0) == 0x80) {
        end++;
    }
    return end - pos;
}

static std::string first_char(const std::string & text) {
    return text.substr(0, char_size(text, 0));
}

common_chat_special_texts::common_chat_special_texts(const llama_vocab * vocab, const std::string & template_source) {
    for (llama_token id = 0; id < llama_vocab_n_tokens(vocab); id++) {
        const auto attr = llama_vocab_get_attr(vocab, id);
        const bool user_defined = attr & LLAMA_TOKEN_ATTR_USER_DEFINED;
        if (!user_defined && !(attr & LLAMA_TOKEN_ATTR_CONTROL)) {
            continue;
        }
        const std::string text = llama_vocab_get_text(vocab, id);
        if (user_defined ? text.size() > 1 && text.find_first_not_of(" \t\r\n") != std::string::npos &&
                               template_source.find(text) != std::string::npos
                         : !text.empty()) {
            items.push_back({ text, user_defined });
            first_bytes.set((uint8_t) text[0]);
        }
    }
    std::stable_sort(items.begin(), items.end(),
                     [](const item & a, const item & b) { return a.text.size() > b.text.size(); });
}

const common_chat_special_texts::item * common_chat_special_texts::at(const std::string & text, size_t pos, bool cut) const {
    if (!first_bytes.test((uint8_t) text[pos])) {
        return nullptr;
    }
    for (const auto & it : items) {
        const auto size = cut ? std::min(it.text.size(), text.size() - pos) : it.text.size();
        if (text.compare(pos, size, it.text, 0, size) == 0) {
            return &it;
        }
    }
    return nullptr;
}

// Every text of a request that a template may write, and whether it is JSON.
static void each_text(common_chat_templates_inputs & inputs, const std::function<void(std::string &, bool)> & fn) {
    for (auto & message : inputs.messages) {
        fn(message.role, false);
        fn(message.content, false);
        fn(message.reasoning_content, false);
        fn(message.tool_name, false);
        fn(message.tool_call_id, false);
        for (auto & part : message.content_parts) {
            if (part.type == "text") {
                fn(part.text, false);
            }
        }
        for (auto & call : message.tool_calls) {
            fn(call.name, false);
            fn(call.id, false);
            fn(call.arguments, true);
        }
    }
    for (auto & tool : inputs.tools) {
        fn(tool.name, false);
        fn(tool.description, false);
        fn(tool.parameters, true);
    }
    for (auto & item : inputs.chat_template_kwargs) {
        fn(item.second, true);
    }
}

common_chat_veil::common_chat_veil(const common_chat_special_texts & special, common_chat_templates_inputs & inputs) :
    special(special) {
    for (const auto & item : special.items) {
        const auto first = first_char(item.text);
        if (std::find(firsts.begin(), firsts.end(), first) == firsts.end()) {
            firsts.push_back(first);
        }
    }

    const uint32_t n_private = 2 * firsts.size();
    const auto is_free = [&](uint32_t begin) {
        bool free = true;
        each_text(inputs, [&](const std::string & text, bool) {
            for (uint32_t i = begin; free && i < begin + n_private; i++) {
                free = text.find(common_unicode_cpt_to_utf8(i)) == std::string::npos;
            }
        });
        return free;
    };
    for (base = PRIVATE_FIRST; !is_free(base); base += n_private) {
        if (base + n_private > PRIVATE_LAST) {
            throw std::invalid_argument("the request uses all private characters of Unicode");
        }
    }

    each_text(inputs, [&](std::string & text, bool is_json) {
        // a template may parse JSON, and would see what an escape stands for
        if (is_json && text.find('\\') != std::string::npos) {
            const auto parsed = common_json::parse_no_throw(text);
            if (!parsed.is_discarded()) {
                auto unescaped = parsed.dump();
                if (covered(unescaped) != unescaped) {
                    text = unescaped;
                }
            }
        }
        text = covered(text);
    });
}

std::string common_chat_veil::over(const common_chat_special_texts::item & item) const {
    const auto first = std::find(firsts.begin(), firsts.end(), first_char(item.text)) - firsts.begin();
    return common_unicode_cpt_to_utf8(base + 2 * first + (item.user_defined ? 1 : 0));
}

std::string common_chat_veil::covered(const std::string & text) {
    std::string result;
    for (size_t i = 0; i < text.size();) {
        // at the end of a text, what a template writes behind it could complete the token
        if (const auto * item = special.at(text, i, true)) {
            result += over(*item);
            i += std::min(text.size() - i, first_char(item->text).size());
            n_covered++;
        } else {
            result += text[i++];
        }
    }
    return result;
}

std::string common_chat_veil::lifted(const std::string & text) const {
    std::string result = text;
    for (size_t i = 0; i < 2 * firsts.size(); i++) {
        string_replace_all(result, common_unicode_cpt_to_utf8(base + i), firsts[i / 2]);
    }
    return result;
}

std::vector<common_chat_prompt_part> common_chat_veil::split(const std::string & prompt) const {
    std::vector<common_chat_prompt_part> parts;
    std::string text;
    const auto close = [&] {
        if (!text.empty()) {
            parts.push_back({ lifted(text), false });
            text.clear();
        }
    };
    for (size_t i = 0; i < prompt.size();) {
        if (const auto * item = special.at(prompt, i)) {
            close();
            parts.push_back({ item->text, true });
            i += item->text.size();
            continue;
        }
        const auto size = char_size(prompt, i);
        text += prompt.substr(i, size);
        for (size_t n = 0; n < firsts.size(); n++) {
            // a user-defined token is read from plain text too, unless it is cut
            if (prompt.compare(i, size, common_unicode_cpt_to_utf8(base + 2 * n + 1)) == 0) {
                close();
            }
        }
        i += size;
    }
    close();
    return parts;
}

llama_tokens common_chat_tokenize(const llama_vocab * vocab, const std::vector<common_chat_prompt_part> & parts) {
    llama_tokens result;
    if (llama_vocab_get_add_bos(vocab)) {
        result.push_back(llama_vocab_bos(vocab));
    }
    for (const auto & part : parts) {
        const auto tokens = common_tokenize(vocab, part.text, false, part.special);
        result.insert(result.end(), tokens.begin(), tokens.end());
    }
    if (llama_vocab_get_add_eos(vocab)) {
        result.push_back(llama_vocab_eos(vocab));
    }
    return result;
}
