// the order of candidates: the larger value first, NaN before all, the lower index among equals
#pragma once

#include "portable.h"

namespace spear_fast {

template <typename acc_t>
struct Candidate {
  acc_t value;
  // beam * vocabulary + token
  int index;
};

template <typename acc_t>
SPEAR_FAST_HOST_DEVICE inline bool is_better(acc_t a, acc_t b) {
  return is_nan(a) ? !is_nan(b) : a > b;
}

template <typename acc_t>
SPEAR_FAST_HOST_DEVICE inline bool comes_before(const Candidate<acc_t>& a, const Candidate<acc_t>& b) {
  return is_better(a.value, b.value) || (!is_better(b.value, a.value) && a.index < b.index);
}

// the best candidates so far, best first; for one thread
template <typename acc_t>
struct Best {
  Candidate<acc_t>* rows;
  int wanted;
  int count = 0;

  SPEAR_FAST_HOST_DEVICE Best(Candidate<acc_t>* rows, int wanted) : rows(rows), wanted(wanted) {}

  SPEAR_FAST_HOST_DEVICE bool full() const { return count == wanted; }

  // what does not exceed it cannot enter, when offered in the order of the indices
  SPEAR_FAST_HOST_DEVICE acc_t threshold() const { return rows[wanted - 1].value; }

  SPEAR_FAST_HOST_DEVICE void offer(const Candidate<acc_t>& one) {
    if (full() && !comes_before(one, rows[wanted - 1])) {
      return;
    }
    int place = full() ? wanted - 1 : count++;
    for (; place > 0 && comes_before(one, rows[place - 1]); --place) {
      rows[place] = rows[place - 1];
    }
    rows[place] = one;
  }

  // where the vocabulary has too few candidates
  SPEAR_FAST_HOST_DEVICE void fill_up() {
    while (!full()) {
      rows[count++] = {minus_infinite<acc_t>(), 0};
    }
  }
};

}  // namespace spear_fast
