// Declared shapes solved for the dims of a node's outputs: once for TensorRT's symbolic dims, once for numbers.
#pragma once

#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "op.h"

namespace qpass {

// Algebra: `Dim`, constant(int64_t), times(Dim, int64_t), divided(Dim, int64_t), broadcast(Dim, Dim), and equal(Dim, Dim) and
// broadcastable(Dim, Dim), which are true where it cannot be known.
template <typename Algebra>
class Shapes {
 public:
  using Dim = typename Algebra::Dim;

  Shapes(const Node& node, Algebra algebra) : node_(node), algebra_(algebra) {}

  // Takes note of a tensor's shape; false where it does not fit the declaration or what was seen before.
  bool bind(const Slot& slot, const std::vector<Dim>& dims) {
    std::string text = node_.shape(slot);
    for (size_t bar; (bar = text.find('|')) != std::string::npos; text = text.substr(bar + 1)) {
      Shapes trial = *this;  // "a | b": either
      if (trial.unify(words(text.substr(0, bar)), dims)) {
        lead_ = trial.lead_, has_lead_ = trial.has_lead_, names_ = trial.names_;
        return true;
      }
    }
    return unify(words(text), dims);
  }

  // The dims of an output; false where its declaration names a dim that no input has.
  bool solve(const Slot& slot, std::vector<Dim>* dims) {
    dims->clear();
    for (const std::string& word : words(node_.shape(slot))) {
      if (word == "...") {
        dims->insert(dims->end(), lead_.begin(), lead_.end());
      } else if (is_number(word)) {
        dims->push_back(algebra_.constant(std::atoll(word.c_str())));
      } else {
        auto known = names_.find(word.substr(0, word.find('/')));
        if (known == names_.end()) return false;
        dims->push_back(word.find('/') == std::string::npos ? known->second : algebra_.divided(known->second, divisor(word)));
      }
    }
    return true;
  }

 private:
  static bool is_number(const std::string& word) { return word[0] >= '0' && word[0] <= '9'; }

  static std::vector<std::string> words(const std::string& text) {
    std::vector<std::string> found;
    for (size_t at = 0; (at = text.find_first_not_of(' ', at)) != std::string::npos;) {
      size_t end = std::min(text.find(' ', at), text.size());
      found.push_back(text.substr(at, end - at));
      at = end;
    }
    return found;
  }

  bool unify(std::vector<std::string> words, const std::vector<Dim>& dims) {
    bool open = !words.empty() && (words[0] == "..." || words[0] == "~...");
    bool broadcasts = open && words[0] == "~...";
    if (open) words.erase(words.begin());
    if (dims.size() < words.size() || (!open && dims.size() != words.size())) return false;
    size_t lead = dims.size() - words.size();
    std::vector<Dim> leading(dims.begin(), dims.begin() + lead);
    if (open && broadcasts) {
      if (!broadcast(leading)) return false;
    } else if (open && has_lead_) {
      if (leading.size() != lead_.size()) return false;
      for (size_t i = 0; i < lead; ++i) {
        if (!algebra_.equal(leading[i], lead_[i])) return false;
      }
    } else if (open) {
      lead_ = leading, has_lead_ = true;
    }
    for (size_t i = 0; i < words.size(); ++i) {
      if (!bind_name(words[i], dims[lead + i])) return false;
    }
    return true;
  }

  bool bind_name(const std::string& word, Dim dim) {
    if (is_number(word)) return algebra_.equal(dim, algebra_.constant(std::atoll(word.c_str())));
    size_t slash = word.find('/');
    std::string name = word.substr(0, slash);
    if (slash != std::string::npos) dim = algebra_.times(dim, divisor(word));
    auto known = names_.find(name);
    if (known != names_.end()) return algebra_.equal(dim, known->second);
    names_.emplace(name, dim);
    return true;
  }

  int64_t divisor(const std::string& word) const {  // of "K/2" or "K/group_size"
    std::string by = word.substr(word.find('/') + 1);
    return is_number(by) ? std::atoll(by.c_str()) : int64_t(node_.value(by.c_str()));
  }

  bool broadcast(const std::vector<Dim>& other) {
    const std::vector<Dim>& longer = other.size() > lead_.size() ? other : lead_;
    const std::vector<Dim>& shorter = other.size() > lead_.size() ? lead_ : other;
    std::vector<Dim> result = longer;
    size_t skip = longer.size() - shorter.size();
    for (size_t i = 0; i < shorter.size(); ++i) {
      if (!algebra_.broadcastable(longer[skip + i], shorter[i])) return false;
      result[skip + i] = algebra_.broadcast(longer[skip + i], shorter[i]);
    }
    lead_ = result;
    return true;
  }

  const Node& node_;
  Algebra algebra_;
  std::vector<Dim> lead_;
  bool has_lead_ = false;
  std::map<std::string, Dim> names_;
};

}  // namespace qpass
