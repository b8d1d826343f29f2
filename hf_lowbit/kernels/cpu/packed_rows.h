// Attention over tokens kept row by row: int8 under a scale a row, or floats. Included after an Isa, as attend.h.
#pragma once
#include <cstring>

#include "packed_work.h"

namespace lowbit {
namespace {

void int8_scores(const HeadWork& w, const LowbitRows& r, int64_t first, int count, const Rounded* queries) {
    const int dim = w.c.dim;
    alignas(64) int8_t room[1024];
    for (int i = 0; i < count; ++i) {
        const int64_t slot = w.head() * r.room + first + i;
        const int8_t* row = static_cast<const int8_t*>(r.keys) + slot * dim;
        const float scale = half_to_float(r.key_scale[slot]) * w.c.scale;
        if (dim != w.padded) {
            std::memset(room, 0, size_t(w.padded));
            std::memcpy(room, row, size_t(dim));
            row = room;
        }
        for (int q = 0; q < w.queries; ++q) {
            auto sum = Isa::start(0);
            for (int at = 0; at < w.padded; at += kVector) {
                auto key = Isa::load(row + at);
                if constexpr (Isa::kBias != 0) key = Isa::add8(key, Isa::splat(Isa::kBias));
                sum = Isa::template dot<Isa::kBias>(sum, key, Isa::load(queries[q].rounded + at));
            }
            const int32_t whole = add_lanes(sum) - Isa::kBias * queries[q].sum;
            w.scores[q * kKvBlock + i] = float(whole) * (queries[q].scale * scale);
        }
    }
}

// A row of `kind` as floats: itself, or widened into `room`.
inline const float* widened(const void* data, int64_t at, int kind, int dim, float* room) {
    if (kind != 2) return cache_row(data, at, kind, dim, room);
    const uint16_t* row = static_cast<const uint16_t*>(data) + at;
    for (int i = 0; i < dim; i += Isa::kLanes) Isa::storef(room + i, Isa::halves(row + i));
    return room;
}

void float_scores(const HeadWork& w, const LowbitRows& r, int64_t first, int count) {
    const int dim = w.c.dim;
    for (int i = 0; i < count; ++i) {
        const float* row = widened(r.keys, (w.head() * r.room + first + i) * dim, r.kind, dim, w.folded);
        for (int q = 0; q < w.queries; ++q) w.scores[q * kKvBlock + i] = w.c.scale * dot_row(w.query(q, r.low), row, dim);
    }
}

void mix_int8(const HeadWork& w, const LowbitRows& r, int64_t first, int count) {
    const int dim = w.c.dim;
    const int64_t slot = w.head() * r.room + first;
    for (int i = 0; i < count; ++i) {
        const float scale = half_to_float(r.value_scale[slot + i]);
        for (int q = 0; q < w.queries; ++q) w.scores[q * kKvBlock + i] *= scale;
    }
    const int8_t* rows = static_cast<const int8_t*>(r.values) + slot * dim;
    mix_rows(w, count, w.scores, [&](int i, int c) { return Isa::signed_bytes(rows + int64_t(i) * dim + c); });
}

void mix_floats(const HeadWork& w, const LowbitRows& r, int64_t first, int count) {
    const int dim = w.c.dim;
    const int64_t slot = w.head() * r.room + first;
    if (r.kind == 0) {
        const float* rows = static_cast<const float*>(r.values) + slot * dim;
        mix_rows(w, count, w.scores, [&](int i, int c) { return Isa::loadf(rows + int64_t(i) * dim + c); });
        return;
    }
    if (r.kind == 2) {
        const uint16_t* rows = static_cast<const uint16_t*>(r.values) + slot * dim;
        mix_rows(w, count, w.scores, [&](int i, int c) { return Isa::halves(rows + int64_t(i) * dim + c); });
        return;
    }
    for (int i = 0; i < count; ++i) {
        const float* row = widened(r.values, (slot + i) * dim, r.kind, dim, w.folded);
        for (int q = 0; q < w.queries; ++q) add_row(w.scores[q * kKvBlock + i], row, w.sums + q * dim, dim);
    }
}

void attend_rows(const HeadWork& w, const LowbitRows& r, float* raw) {
    const LowbitKv& c = w.c;
    const Rounded* queries = w.plain;
    if (r.kind == kRowInt8 && r.low && c.turned != c.queries) {
        for (int q = 0; q < w.queries; ++q) round_query(w.query(q, true), c.dim, w.other[q]);
        queries = w.other;
    }
    for (int64_t first = 0; first < r.length; first += kKvBlock) {
        const int count = int(r.length - first < kKvBlock ? r.length - first : kKvBlock);
        if (r.kind == kRowInt8) int8_scores(w, r, first, count, queries);
        else float_scores(w, r, first, count);
        if (r.positions) {
            const int64_t at = w.head() * r.position_room + first;
            hide(w, count, [&](int i) { return position_at(r.positions, r.wide, at + i); });
        } else {
            hide(w, count, [&](int i) { return r.first + first + i; });
        }
        if (raw) {
            for (int q = 0; q < w.queries; ++q) {
                std::memcpy(raw + q * kv_raw_room(c) + first, w.scores + q * kKvBlock, sizeof(float) * size_t(count));
            }
        }
        soften(w, count);
        if (r.kind == kRowInt8) mix_int8(w, r, first, count);
        else mix_floats(w, r, first, count);
    }
}

}  // namespace
}  // namespace lowbit
