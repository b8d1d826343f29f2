// Which body runs: the best one the processor has, unless HF_LOWBIT_CPU_ISA names a lower one.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "body.h"
#include "lowbit_cpu.h"

namespace lowbit {
namespace {

const Body* const* usable() {  // best first, ends with null
    static const Body* found[5] = {};
    static const bool made = [] {
        int count = 0;
        for (const Body* b : {body_avx512(), body_avx2(), body_neon(), body_portable()}) {
            if (b && b->runs_here()) found[count++] = b;
        }
        return true;
    }();
    (void)made;
    return found;
}

const Body* named(const char* name) {
    for (const Body* const* b = usable(); *b; ++b) {
        if (!std::strcmp((*b)->name, name)) return *b;
    }
    return nullptr;
}

const Body* first_choice() {
    const char* wanted = std::getenv("HF_LOWBIT_CPU_ISA");
    const Body* found = wanted ? named(wanted) : nullptr;
    return found ? found : usable()[0];
}

std::atomic<const Body*>& current() {
    static std::atomic<const Body*> chosen{first_choice()};
    return chosen;
}

}  // namespace

const Body& body() { return *current().load(std::memory_order_relaxed); }

}  // namespace lowbit

using namespace lowbit;

int32_t lowbit_abi_version() { return LOWBIT_ABI_VERSION; }

const char* lowbit_isa() { return body().name; }

const char* lowbit_isas() {
    static const std::string names = [] {
        std::string all;
        for (const Body* const* b = usable(); *b; ++b) all += (all.empty() ? "" : " ") + std::string((*b)->name);
        return all;
    }();
    return names.c_str();
}

int32_t lowbit_set_isa(const char* name) {
    const Body* found = named(name);
    if (found) current().store(found, std::memory_order_relaxed);
    return found != nullptr;
}
