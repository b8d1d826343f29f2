// Memory that calls cut their scratch from.
#pragma once
#include <cstdint>
#include <memory>

#include "matrix.h"

namespace lowbit {

inline void round_up(char*& at) { at = reinterpret_cast<char*>(align64(reinterpret_cast<intptr_t>(at))); }

template <class T>
T* take(char*& at, int64_t count) {
    round_up(at);
    T* out = reinterpret_cast<T*>(at);
    at += count * int64_t(sizeof(T));
    return out;
}

// Memory that grows as needed.
struct Room {
    std::unique_ptr<char[]> data;
    int64_t size = 0;

    char* get(int64_t bytes) {
        if (size < bytes) {
            data.reset();
            size = 0;
            data.reset(new char[size_t(bytes)]);
            size = bytes;
        }
        return data.get();
    }
};

}  // namespace lowbit
