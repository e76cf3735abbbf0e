// Static __shared__ variables. For g++ they are function-local statics, so they are found in the symbol table of the
// library that holds the kernel: objects without initial value, local to a function of pyvidx::cuda, which are named
// _Z Z <function> E <variable>.
// A static in host code there must have an initializer: then it is not taken for shared memory.
#include <dlfcn.h>
#include <elf.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <stdexcept>

#include "state.h"

namespace cuemu {
namespace {

constexpr char kNamespace[] = "N6pyvidx4cuda";

struct Variable {
  std::string name;  // mangled, from the N of the namespace on
  char* address;
  size_t size;
};

struct Module {
  std::map<const void*, std::string> functions;  // address -> mangled name from the N on
  std::vector<Variable> shared;
};

constexpr size_t kSlot = 65536;  // the alignment of __shared__ under AddressSanitizer
constexpr size_t kPage = 4096;

// The name of the outermost function: N6pyvidx4cuda10some_kernelIfE... -> some_kernel.
std::string function_of(const std::string& name) {
  size_t digits = 0;
  const size_t length = std::stoul(name.substr(sizeof kNamespace - 1), &digits);
  return name.substr(sizeof kNamespace - 1 + digits, length);
}

bool starts_with(const std::string& s, const char* prefix) { return s.rfind(prefix, 0) == 0; }

// AddressSanitizer puts no red zones around the statics of templates; there is room for ours up to the next object.
void add_red_zones(const std::vector<Variable>& shared, std::vector<char*> objects, char* section_end) {
  std::sort(objects.begin(), objects.end());
  for (const Variable& v : shared) {
    char* const end = v.address + (v.size + 7) / 8 * 8;
    const auto next = std::lower_bound(objects.begin(), objects.end(), end);
    char* const limit = std::min({next == objects.end() ? section_end : *next, section_end, v.address + kSlot});
    if (limit > end) asan_poison(end, size_t(limit - end));
  }
}

Module read_module(const char* path, char* base) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (bytes.size() < sizeof(Elf64_Ehdr)) throw std::runtime_error(std::string("cuda_emu: cannot read ") + path);
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(bytes.data());
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(bytes.data() + header->e_shoff);
  if (header->e_type != ET_DYN) base = nullptr;
  Module module;
  std::vector<char*> objects;
  std::set<std::string> guarded;  // statics with a dynamic initializer: host code's
  char* bss_end = nullptr;
  for (int s = 0; s < header->e_shnum; ++s) {
    if (sections[s].sh_type != SHT_SYMTAB) continue;
    const auto* symbols = reinterpret_cast<const Elf64_Sym*>(bytes.data() + sections[s].sh_offset);
    const char* names = bytes.data() + sections[sections[s].sh_link].sh_offset;
    for (size_t i = 0; i < sections[s].sh_size / sizeof(Elf64_Sym); ++i) {
      const Elf64_Sym& symbol = symbols[i];
      const std::string name = names + symbol.st_name;
      char* const address = base + symbol.st_value;
      const int type = ELF64_ST_TYPE(symbol.st_info);
      const size_t qualified = name.find(kNamespace);
      if (qualified == std::string::npos) {
        // no function or variable of a kernel file, but maybe one that lies behind a variable
      } else if (starts_with(name, "_ZGVZ")) {
        guarded.insert(name.substr(qualified));
      } else if (type == STT_FUNC && qualified == 2) {
        module.functions[address] = name.substr(2);
      }
      if (type != STT_OBJECT || symbol.st_shndx >= header->e_shnum) continue;
      const Elf64_Shdr& section = sections[symbol.st_shndx];
      if (section.sh_type != SHT_NOBITS) continue;
      objects.push_back(address);
      if (starts_with(name, "_ZZ") && name.find_first_not_of('Z', 2) == qualified) {  // ZZ: of a lambda in a function
        bss_end = base + (section.sh_addr + section.sh_size + kPage - 1) / kPage * kPage;
        module.shared.push_back({name.substr(qualified), address, symbol.st_size});
      }
    }
  }
  if (module.functions.empty()) {
    throw std::runtime_error(std::string("cuda_emu: ") + path + " has no symbol table with kernels of pyvidx::cuda");
  }
  auto is_host = [&](const Variable& v) { return guarded.count(v.name) > 0; };
  module.shared.erase(std::remove_if(module.shared.begin(), module.shared.end(), is_host), module.shared.end());
  add_red_zones(module.shared, objects, bss_end);
  return module;
}

struct Shared {
  std::string symbol;
  std::vector<Variable> own, of_device_functions;
};

const Shared& shared_of(const void* kernel) {
  static std::map<const void*, Module> modules;
  static std::map<const void*, Shared> cache;
  const auto known = cache.find(kernel);
  if (known != cache.end()) return known->second;
  Dl_info info;
  if (dladdr(kernel, &info) == 0) throw std::runtime_error("cuda_emu: a kernel is in no library");
  if (modules.count(info.dli_fbase) == 0) {
    modules[info.dli_fbase] = read_module(info.dli_fname, static_cast<char*>(info.dli_fbase));
  }
  const Module& module = modules[info.dli_fbase];
  const auto name = module.functions.find(kernel);
  if (name == module.functions.end()) throw std::runtime_error("cuda_emu: kernels belong into pyvidx::cuda");
  Shared shared;
  shared.symbol = "_Z" + name->second;
  for (const Variable& v : module.shared) {
    if (starts_with(v.name, (name->second + "E").c_str())) {
      shared.own.push_back(v);
    } else if (function_of(v.name).find("_kernel") == std::string::npos) {  // other kernels' cannot be reached
      shared.of_device_functions.push_back(v);
    }
  }
  return cache[kernel] = shared;
}

// Not memset: the sanitizers would take it for an access by the kernel.
void fill(char* p, size_t size) { asm volatile("rep stosb" : "+D"(p), "+c"(size) : "a"(0xff) : "memory"); }

}  // namespace

const std::string& symbol_of(const void* kernel) { return shared_of(kernel).symbol; }

size_t static_shared_bytes(const void* kernel) {
  size_t bytes = 0;
  for (const Variable& v : shared_of(kernel).own) bytes += v.size;
  return bytes;
}

void poison_static_shared(const void* kernel) {
  const Shared& shared = shared_of(kernel);
  for (const Variable& v : shared.own) fill(v.address, v.size);
  for (const Variable& v : shared.of_device_functions) fill(v.address, v.size);
}

}  // namespace cuemu
