#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

namespace jinja {

// The calls of the parser and of the runtime follow the structure of a template, which the stack bounds.
class nesting {
  public:
    nesting(size_t & depth, size_t limit) : depth(depth) {
        if (depth >= limit) {
            throw std::runtime_error("nested more than " + std::to_string(limit) + " levels deep");
        }
        depth++;
    }
    ~nesting() { depth--; }
    nesting(const nesting &) = delete;

  private:
    size_t & depth;
};

} // namespace jinja
