// What the threads of a block do together: barriers, warp groups, cp.async. Not instrumented (see sanitizers.h).
#include <algorithm>
#include <cstring>

#include "state.h"

namespace cuemu {

std::string text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

std::string text(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

namespace {

void complete(Meeting& meeting) {
  meeting.arrived = 0;
  meeting.generation++;
  // The slots of the meeting after this one; nobody reads its predecessor's any more.
  meeting.trues[meeting.generation & 1] = 0;
  meeting.present[meeting.generation & 1] = 0;
}

void wait_for(const Meeting& meeting, Site site) {
  Fiber& fiber = *engine.current;
  fiber.state = State::waiting;
  fiber.at = &meeting;
  fiber.generation = meeting.generation;
  fiber.site = site;
  to_main(false);
}

void copy(const Copy& c) {
  if ((reinterpret_cast<uintptr_t>(c.to) | reinterpret_cast<uintptr_t>(c.from)) % c.bytes != 0) {
    fail("cp.async: an address is not aligned to the size", c.site);
  }
  if (asan_is_poisoned(c.from, c.bytes)) fail("cp.async reads out of bounds", c.site);
  if (asan_is_poisoned(c.to, c.bytes)) fail("cp.async writes out of bounds", c.site);
  tsan_copied(c.to, c.from, c.bytes);
  std::memcpy(c.to, c.from, c.bytes);
}

}  // namespace

void thread_returns() {
  Fiber& fiber = *engine.current;
  fiber.committed.push_back(std::move(fiber.uncommitted));
  fiber.uncommitted.clear();
  for (const auto& group : fiber.committed) {
    if (!group.empty()) fail("the thread returns without having waited for this cp.async", group.front().site);
  }
  fiber.committed.clear();
  fiber.state = State::returned;
  engine.alive--;
  if (engine.barrier.arrived > 0) fail("a thread returns while others wait at __syncthreads", engine.barrier.site);
  Warp& warp = engine.warps[fiber.thread / 32];
  warp.returned |= 1u << fiber.thread % 32;
  for (auto& group : warp.groups) {  // lanes that have returned are not waited for
    Meeting& meeting = group->meeting;
    if (meeting.arrived != 0 && meeting.arrived == (group->mask & ~warp.returned)) complete(meeting);
  }
}

void fail(const char* what, Site site) {
  engine.error = std::string(engine.kernel->name) + ", block " + text(blockIdx) + ", thread " +
                 text(engine.current->index) + ", " + text(site) + ": " + what;
  to_main(true);
  __builtin_unreachable();
}

int lane() { return int(engine.current->thread % 32); }
void* dynamic_shared() { return engine.shared; }

int sync_block(bool predicate, Site site) {
  if (engine.alive < engine.threads) fail("__syncthreads after a thread of the block has returned", site);
  Meeting& barrier = engine.barrier;
  if (barrier.arrived == 0) barrier.site = site;
  if (barrier.site.line != site.line || std::strcmp(barrier.site.file, site.file) != 0) {
    fail(("divergent barrier: other threads wait at " + text(barrier.site)).c_str(), site);
  }
  const unsigned slot = barrier.generation & 1;
  tsan_release(&barrier.token[slot]);
  barrier.trues[slot] += predicate;
  if (++barrier.arrived == engine.threads) {
    complete(barrier);
  } else {
    wait_for(barrier, site);
  }
  tsan_acquire(&barrier.token[slot]);
  return barrier.trues[slot];
}

Lanes sync_warp(unsigned mask, uint64_t value, bool orders_memory, Site site) {
  Warp& warp = engine.warps[engine.current->thread / 32];
  const unsigned self = unsigned(lane());
  if (!(mask >> self & 1)) fail("a lane calls a warp function with a mask that lacks it", site);
  auto found = std::find_if(warp.groups.begin(), warp.groups.end(), [=](auto& group) { return group->mask == mask; });
  if (found == warp.groups.end()) {
    warp.groups.push_back(std::make_unique<WarpGroup>());
    found = warp.groups.end() - 1;
    (*found)->mask = mask;
  }
  Meeting& meeting = (*found)->meeting;
  if (meeting.arrived == 0) meeting.site = site;
  if (meeting.site.line != site.line || std::strcmp(meeting.site.file, site.file) != 0) {
    fail(("divergent warp function: other lanes wait at " + text(meeting.site)).c_str(), site);
  }
  const unsigned slot = meeting.generation & 1;
  if (orders_memory) tsan_release(&meeting.token[slot]);
  meeting.value[slot][self] = value;
  meeting.present[slot] |= 1u << self;
  meeting.arrived |= 1u << self;
  if (meeting.arrived == (mask & ~warp.returned)) {
    complete(meeting);
  } else {
    wait_for(meeting, site);
  }
  if (orders_memory) tsan_acquire(&meeting.token[slot]);
  return {meeting.value[slot], meeting.present[slot]};
}

void cp_async(void* shared, const void* global, size_t bytes, Site site) {
  engine.current->uncommitted.push_back({shared, global, bytes, site});
}

void cp_async_commit() {
  Fiber& fiber = *engine.current;
  fiber.committed.push_back(std::move(fiber.uncommitted));
  fiber.uncommitted.clear();
}

void cp_async_wait_group(int pending) {
  auto& groups = engine.current->committed;
  while (groups.size() > size_t(pending)) {
    for (const Copy& c : groups.front()) copy(c);
    groups.erase(groups.begin());
  }
}

void cp_async_wait_all() {
  Fiber& fiber = *engine.current;
  cp_async_wait_group(0);
  for (const Copy& c : fiber.uncommitted) copy(c);
  fiber.uncommitted.clear();
}

}  // namespace cuemu
