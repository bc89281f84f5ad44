// What the kernels of recurrent layers share.
//
// States are rows of an array. A slot has a ring of `places` rows, slot * places and following: the state behind the token
// at a position is kept at place (position + offset of the slot) mod places. A token reads the place in front of its own and
// writes its own, so a step that is run again finds what it read before.

// Where the state behind `position` is kept.
DEVICE int place_of(int position, int offset, int places) {
    const int place = (position + offset) % places;
    return place < 0 ? place + places : place;
}

DEVICE float silu(float x) { return x / __fadd_rn(1.0f, expf(-x)); }

struct PromptSpan {  // engine/cuda/recurrent/mamba_plan.py span_table has the same columns
    int row, n_rows, n_past, read, write;  // read, write: rows of states
};
