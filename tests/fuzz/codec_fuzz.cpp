// Fuzzer of the codecs and the container. Meant to run under ASan and UBSan (`make fuzz N=1` runs a million
// cases); every case is made from (seed, number) alone, so `codec_fuzz --seed S --from I --cases 1` repeats
// it.
//
// A case is one of
//   round trip   a random map, options and chunk size: the same bytes on two instruction sets and thread
//                counts, decoded on another to what went in; a chunk alone as well
//   mutation     a blob from such a map with bytes changed, cut out, put in or copied, most often with the
//                checksums made right again so that the damage reaches the codec: it must decode, or throw
//                FormatError, and do the same on two instruction sets
//   raw bytes    random parameters and payloads given straight to a codec: likewise
// Anything else (a sanitizer's report, another exception, another result, symbols out of range, too much
// memory) is a failure: the case is printed and the program aborts.
#include <sys/resource.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "codec/container.h"
#include "codec/crc32c.h"
#include "common/cpu.h"

using namespace actzip;
using namespace actzip::codec;

// No single allocation above 64 MiB, not more than 1 GiB altogether (sanitizer bookkeeping included).
extern "C" const char* __asan_default_options();
extern "C" const char* __asan_default_options() {
  return "max_allocation_size_mb=64:hard_rss_limit_mb=1024:quarantine_size_mb=16:detect_leaks=1";
}

namespace {

struct Random {  // splitmix64
  uint64_t s;
  uint64_t next() {
    uint64_t z = (s += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  uint64_t below(uint64_t n) { return next() % n; }
  bool chance(uint64_t percent) { return below(100) < percent; }
};

uint64_t current_seed, current_case;

[[noreturn]] void failure(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n  repeat with: codec_fuzz --seed %llu --from %llu --cases 1\n",
               what.c_str(), static_cast<unsigned long long>(current_seed),
               static_cast<unsigned long long>(current_case));
  std::abort();
}

void pick_isa(Random& r) {
  const auto& all = supported_isas();
  if (!force_isa(isa_name(all[r.below(all.size())]))) failure("an instruction set cannot be forced");
}

struct Map {
  Header h;
  std::vector<uint8_t> data;  // contiguous, kPad more bytes
  EncodeOptions options;
  std::vector<int64_t> strides() const {
    std::vector<int64_t> s(h.shape.size());
    int64_t step = h.info.width;
    for (size_t i = s.size(); i-- > 0;) {
      s[i] = step;
      step *= static_cast<int64_t>(h.shape[i]);
    }
    return s;
  }
};

// A random map for a codec that takes it, of at most `most` elements.
Map random_map(Random& r, uint64_t most) {
  Map m;
  Header& h = m.h;
  const auto& all = codecs();
  h.codec = all[r.below(all.size())];
  const bool floats = (h.codec->kinds & kFloats) && ((h.codec->kinds & kIntegers) == 0 || r.chance(30));
  if (floats) {
    const Dtype d[3] = {Dtype::f16, Dtype::bf16, Dtype::f32};
    do {
      h.dtype = d[r.below(3)];
      h.bits = h.dtype == Dtype::f32 ? 32 : 16;
    } while (!(h.codec->kinds & kind_bit(h.dtype == Dtype::f16    ? Kind::float16
                                         : h.dtype == Dtype::bf16 ? Kind::bfloat16
                                                                  : Kind::float32)));
  } else {
    h.bits = r.chance(40) ? 8 : static_cast<int>(1 + r.below(16));
    h.is_signed = h.bits > 1 && r.chance(30);
    h.dtype = h.is_signed ? (h.bits <= 8 ? Dtype::i8 : Dtype::i16) : (h.bits <= 8 ? Dtype::u8 : Dtype::u16);
    if (r.chance(20)) {
      h.has_quantizer = true;
      h.dtype = Dtype::f32;
      h.scale = 0.5f;
    }
  }
  h.from_torch = r.chance(50);
  uint64_t left = r.below(most) + 1;
  const size_t dims = r.below(5);
  for (size_t i = 0; i < dims; ++i) {
    const uint64_t d =
        i + 1 == dims && r.chance(50) ? left : 1 + r.below(std::min<uint64_t>(left, r.chance(50) ? 8 : 64));
    h.shape.push_back(d);
    left = std::max<uint64_t>(left / d, 1);
  }
  std::reverse(h.shape.begin(), h.shape.end());
  h.derive();
  m.options.threads = r.chance(5) ? 2 : 1;
  m.options.chunk_elements = static_cast<uint32_t>(r.chance(60) ? 65536 : 1 + r.below(most));
  // Names of a codec's options, with values that are often right.
  std::string names = h.codec->options;
  while (!names.empty() && r.chance(40)) {
    const size_t end = std::min(names.find(' '), names.size());
    const int64_t values[8] = {0, 1, 2, 4, 8, 16, 32, static_cast<int64_t>(r.below(20)) - 2};
    m.options.codec_options[names.substr(0, end)] = values[r.below(8)];
    names.erase(0, std::min(names.size(), end + 1));
  }

  const size_t n = h.elements, w = static_cast<size_t>(h.info.width);
  m.data.resize(n * w + kPad);
  const uint64_t density = r.chance(20) ? r.below(2) * 100 : r.below(101);
  const int magnitude = static_cast<int>(r.below(static_cast<uint64_t>(std::min(h.bits, 16)) + 1));
  const uint32_t one = h.dtype == Dtype::f16 ? 0x3c00 : h.dtype == Dtype::bf16 ? 0x3f80 : 0x3f800000;
  const uint64_t wild = r.chance(20) ? r.below(101) : 0;
  uint32_t last = 0;
  for (size_t i = 0; i < n; ++i) {
    uint32_t v = 0;
    if (r.chance(20)) {
      v = last;
    } else if (r.chance(density)) {
      if (floats) {
        v = r.chance(wild) ? static_cast<uint32_t>(r.next())
                           : one - static_cast<uint32_t>(r.below(one / 8 + 1)) +
                                 static_cast<uint32_t>(r.below(one / 16 + 1));
      } else if (h.is_signed) {
        const int64_t half = int64_t{1} << (h.bits - 1);
        v = static_cast<uint32_t>(std::clamp<int64_t>(
            static_cast<int64_t>(r.below(uint64_t{2} << magnitude)) - (int64_t{1} << magnitude), -half,
            half - 1));
      } else {
        v = static_cast<uint32_t>(
            std::min<uint64_t>(r.below(uint64_t{1} << magnitude), (uint64_t{1} << h.bits) - 1));
      }
    }
    last = v;
    std::memcpy(&m.data[i * w], &v, w);  // little-endian only, like the machines this runs on
  }
  return m;
}

uint8_t* into_vector(void* c, size_t n) {
  auto* v = static_cast<std::vector<uint8_t>*>(c);
  v->resize(n);
  return v->data();
}

// False if the encoder refused the options.
bool encode_map(const Map& m, std::vector<uint8_t>* blob) {
  try {
    blob->resize(encode(m.h, {m.data.data(), m.strides()}, m.options, into_vector, blob));
  } catch (const ArgumentError&) {
    if (m.options.codec_options.empty()) failure("the encoder refuses a map without options");
    return false;
  }
  return true;
}

// What decoding came to: the output, or the message.
struct Outcome {
  bool decoded = false, too_large = false;
  std::vector<uint8_t> out;
  std::string message;
  bool operator==(const Outcome& o) const {
    return decoded == o.decoded && too_large == o.too_large && out == o.out && message == o.message;
  }
};

Outcome decode_blob(const uint8_t* blob, size_t size, bool verify) {
  Outcome o;
  // In memory of exactly its size, so that a sanitizer sees every read beyond it.
  std::vector<uint8_t> exact(blob, blob + size);
  try {
    const Header h = parse_header(exact.data(), size, size);
    const uint64_t bytes = h.elements * static_cast<uint64_t>(h.info.width);
    if (bytes > (1 << 22)) {
      o.too_large = true;
      return o;
    }
    o.out.resize(bytes);
    Map shape;
    shape.h = h;
    decode(exact.data(), size, h, {o.out.data(), shape.strides()}, verify, 1);
    o.decoded = true;
    if (h.info.kind == Kind::integer && !h.is_signed && h.bits < 8 * h.info.width) {
      const size_t w = static_cast<size_t>(h.info.width);
      for (size_t i = 0; i < h.elements; ++i) {
        uint32_t v = 0;
        std::memcpy(&v, &o.out[i * w], w);
        if (v >> h.bits) failure("a decoded symbol is out of range");
      }
    }
  } catch (const FormatError& e) {
    o.out.clear();
    o.message = e.what();
    if (o.message.empty()) failure("an error without a message");
  }
  return o;
}

std::map<std::string, uint64_t> tally;

void round_trip(Random& r, uint64_t most) {
  const Map m = random_map(r, most);
  std::vector<uint8_t> a, b;
  pick_isa(r);
  if (!encode_map(m, &a)) {
    ++tally["option refused"];
    return;
  }
  pick_isa(r);
  Map again = m;
  again.options.threads = 1;
  encode_map(again, &b);
  if (a != b)
    failure(std::string(m.h.codec->name) + ": other bytes on another instruction set or thread count");
  pick_isa(r);
  const Outcome o = decode_blob(a.data(), a.size(), true);
  if (!o.decoded) failure(std::string(m.h.codec->name) + ": its own blob does not decode: " + o.message);
  if (std::memcmp(o.out.data(), m.data.data(), o.out.size()) != 0)
    failure(std::string(m.h.codec->name) + ": decoded to something else");
  const Header h = parse_header(a.data(), a.size(), a.size());
  if (h.chunks > 0) {
    const uint64_t id = r.below(h.chunks);
    const size_t w = static_cast<size_t>(h.info.width), size = h.box(id).size() * w;
    std::vector<uint8_t> payload(a.begin() + static_cast<std::ptrdiff_t>(h.chunk_offsets[id]),
                                 a.begin() + static_cast<std::ptrdiff_t>(h.chunk_offsets[id + 1]));
    std::vector<uint8_t> part(size);
    decode_chunks(h, {id}, {payload.data()}, {part.data()}, true, 1);
    if (std::memcmp(part.data(), &m.data[h.first(id) * w], size) != 0)
      failure(std::string(m.h.codec->name) + ": a chunk alone decodes to something else");
  }
  ++tally[std::string("round trip ") + m.h.codec->name];
}

// Several maps in one call: the bytes and the arrays of single calls, and damage in one of them is named.
void many(Random& r, uint64_t most) {
  std::vector<Map> maps;
  std::vector<std::vector<uint8_t>> single;
  for (uint64_t k = 2 + r.below(5); k-- > 0;) {
    maps.push_back(random_map(r, r.chance(80) ? most : 10 * most));
    single.emplace_back();
    if (!encode_map(maps.back(), &single.back())) maps.pop_back(), single.pop_back();
  }
  const int threads = static_cast<int>(1 + r.below(4));
  std::vector<EncodeJob> jobs(maps.size());
  std::vector<std::vector<uint8_t>> blobs(maps.size()), outs;
  for (size_t i = 0; i < maps.size(); ++i) {
    jobs[i].header = maps[i].h;
    jobs[i].array = {maps[i].data.data(), maps[i].strides()};
    jobs[i].options = maps[i].options;
    jobs[i].allocate = into_vector;
    jobs[i].context = &blobs[i];
  }
  encode_many(jobs, threads);
  for (size_t i = 0; i < maps.size(); ++i)
    if (blobs[i] != single[i] || jobs[i].size != single[i].size())
      failure(std::string(maps[i].h.codec->name) + ": other bytes in a call for many maps");
  std::vector<Header> headers;
  for (const auto& b : blobs) headers.push_back(parse_header(b.data(), b.size(), b.size()));
  std::vector<DecodeJob> back;
  for (size_t i = 0; i < maps.size(); ++i)
    outs.emplace_back(headers[i].elements * static_cast<uint64_t>(headers[i].info.width));
  for (size_t i = 0; i < maps.size(); ++i)
    back.push_back({blobs[i].data(), blobs[i].size(), &headers[i], {outs[i].data(), maps[i].strides()}});
  decode_many(back, true, threads);
  for (size_t i = 0; i < maps.size(); ++i)
    if (std::memcmp(outs[i].data(), maps[i].data.data(), outs[i].size()) != 0)
      failure(std::string(maps[i].h.codec->name) + ": decoded to something else in a call for many blobs");
  if (!maps.empty()) {
    const size_t i = r.below(maps.size());
    if (blobs[i].size() > headers[i].header_size) {
      blobs[i].back() ^= static_cast<uint8_t>(1u << r.below(8));
      try {
        decode_many(back, true, threads);
        failure("a damaged blob among many decodes");
      } catch (const FormatError& e) {
        if (std::string(e.what()).rfind("blob " + std::to_string(i) + ": ", 0) != 0)
          failure(std::string("the damaged blob is not named: ") + e.what());
      }
    }
  }
  ++tally["many maps in one call"];
}

void mutate(Random& r, std::vector<uint8_t>* b, size_t from, size_t to) {
  if (from >= to) return;
  auto at = [&] { return from + r.below(to - from); };
  const auto begin = b->begin();
  switch (r.below(7)) {
    case 0:
    case 1:
      (*b)[at()] ^= static_cast<uint8_t>(1u << r.below(8));
      break;
    case 2:
      (*b)[at()] = static_cast<uint8_t>(r.next());
      break;
    case 3: {
      const uint8_t special[6] = {0, 255, 127, 128, 1, 64};
      (*b)[at()] = special[r.below(6)];
      break;
    }
    case 4: {  // a run copied over another place
      const size_t x = at(), y = at(), n = std::min({to - x, to - y, size_t{1} + r.below(16)});
      std::memmove(&(*b)[x], &(*b)[y], n);
      break;
    }
    case 5: {  // bytes cut out
      const size_t x = at(), n = std::min(to - x, size_t{1} + r.below(8));
      b->erase(begin + static_cast<std::ptrdiff_t>(x), begin + static_cast<std::ptrdiff_t>(x + n));
      break;
    }
    default:  // bytes put in
      b->insert(begin + static_cast<std::ptrdiff_t>(at()), 1 + r.below(8), static_cast<uint8_t>(r.next()));
  }
}

// The blob with another payload of a chunk, and with other parameters: sizes and checksums right.
std::vector<uint8_t> rebuild(const std::vector<uint8_t>& blob, const Header& h,
                             const std::vector<uint8_t>& params, uint64_t chunk,
                             const std::vector<uint8_t>& payload) {
  // The header up to the parameters, these, the index, the checksum; the varint of their length is written
  // anew.
  const size_t index = h.header_size - 4 - 8 * h.chunks;
  size_t length = 1;
  for (uint64_t v = h.params.size(); v >= 128; v >>= 7) ++length;
  std::vector<uint8_t> out(blob.begin(),
                           blob.begin() + static_cast<std::ptrdiff_t>(index - h.params.size() - length));
  for (uint64_t v = params.size();; v >>= 7) {
    out.push_back(static_cast<uint8_t>((v & 127) | (v >= 128 ? 128 : 0)));
    if (v < 128) break;
  }
  out.insert(out.end(), params.begin(), params.end());
  std::vector<uint8_t> body;
  auto u32 = [&](uint32_t v) {
    for (int i = 0; i < 4; ++i) out.push_back(static_cast<uint8_t>(v >> (8 * i)));
  };
  for (uint64_t i = 0; i < h.chunks; ++i) {
    const std::vector<uint8_t> p =
        i == chunk ? payload
                   : std::vector<uint8_t>(blob.begin() + static_cast<std::ptrdiff_t>(h.chunk_offsets[i]),
                                          blob.begin() + static_cast<std::ptrdiff_t>(h.chunk_offsets[i + 1]));
    u32(static_cast<uint32_t>(p.size()));
    u32(crc32c(p.data(), p.size()));
    body.insert(body.end(), p.begin(), p.end());
  }
  const uint32_t size = static_cast<uint32_t>(out.size() + 4);
  for (size_t i = 0; i < 4; ++i) out[10 + i] = static_cast<uint8_t>(size >> (8 * i));
  u32(crc32c(out.data(), out.size()));
  out.insert(out.end(), body.begin(), body.end());
  return out;
}

void compare(Random& r, const std::vector<uint8_t>& blob, bool verify, const char* name) {
  pick_isa(r);
  const Outcome a = decode_blob(blob.data(), blob.size(), verify);
  pick_isa(r);
  const Outcome b = decode_blob(blob.data(), blob.size(), verify);
  if (!(a == b))
    failure(std::string(name) + ": another outcome on another instruction set: " + a.message + " / " +
            b.message);
  ++tally[std::string(a.decoded     ? "mutation decodes "
                      : a.too_large ? "mutation too large "
                                    : "mutation refused ") +
          name];
}

void mutation(Random& r, uint64_t most) {
  const Map m = random_map(r, most);
  std::vector<uint8_t> blob;
  pick_isa(r);
  if (!encode_map(m, &blob)) return;
  const char* name = m.h.codec->name;
  const Header h = parse_header(blob.data(), blob.size(), blob.size());
  if (r.chance(15) || h.chunks == 0) {  // anywhere, header included
    for (uint64_t k = 1 + r.below(3); k-- > 0;)
      mutate(r, &blob, 0, std::min(blob.size(), h.header_size + 16));
    if (r.chance(70) && blob.size() > 14) {  // with the header's checksum right
      const size_t end = static_cast<size_t>(blob[10] | blob[11] << 8);
      if (end >= 4 && end <= blob.size()) {
        const uint32_t c = crc32c(blob.data(), end - 4);
        for (size_t i = 0; i < 4; ++i) blob[end - 4 + i] = static_cast<uint8_t>(c >> (8 * i));
      }
    }
    compare(r, blob, r.chance(50), name);
    return;
  }
  const uint64_t id = r.below(h.chunks);
  std::vector<uint8_t> params = h.params;
  std::vector<uint8_t> payload(blob.begin() + static_cast<std::ptrdiff_t>(h.chunk_offsets[id]),
                               blob.begin() + static_cast<std::ptrdiff_t>(h.chunk_offsets[id + 1]));
  if (!params.empty() && r.chance(40))
    for (uint64_t k = 1 + r.below(3); k-- > 0;) mutate(r, &params, 0, params.size());
  else
    for (uint64_t k = 1 + r.below(4); k-- > 0;) mutate(r, &payload, 0, payload.size());
  compare(r, rebuild(blob, h, params, id, payload), true, name);
}

void raw_bytes(Random& r, uint64_t most) {
  const Map m = random_map(r, most);
  const Codec& codec = *m.h.codec;
  MapInfo info = m.h.info;
  std::vector<uint8_t> params(r.below(r.chance(50) ? 4 : 80)), payload(r.below(r.chance(50) ? 20 : 400));
  for (auto* v : {&params, &payload})
    for (auto& x : *v) x = static_cast<uint8_t>(r.chance(30) ? r.below(4) : r.next());
  if (r.chance(40)) {  // parameters that fit
    std::vector<uint8_t> blob;
    if (encode_map(m, &blob)) params = parse_header(blob.data(), blob.size(), blob.size()).params;
  }
  Box box{0,
          0,
          0,
          static_cast<uint32_t>(info.planes),
          static_cast<uint32_t>(info.rows),
          static_cast<uint32_t>(info.cols)};
  std::string first;
  std::vector<uint8_t> out[2];
  for (int k = 0; k < 2; ++k) {
    pick_isa(r);
    std::string message;
    try {
      std::vector<uint8_t> in = payload;
      in.resize(payload.size() + kPad, k ? 0xa5 : 0);  // what follows the payload must not matter
      const auto coder = codec.open(info, params.data(), params.size());
      out[k].resize(box.size() * static_cast<size_t>(info.width));
      coder->decode(in.data(), payload.size(), box, out[k].data(), thread_scratch());
    } catch (const FormatError& e) {
      message = e.what();
      out[k].clear();
    }
    if (k == 0)
      first = message;
    else if (message != first || out[0] != out[1])
      failure(std::string(codec.name) + ": another outcome from the same bytes: " + first + " / " + message);
  }
  ++tally[std::string(first.empty() ? "raw bytes decode " : "raw bytes refused ") + codec.name];
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t cases = 10000, seed = 1, from = 0;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    const uint64_t v = std::strtoull(argv[i + 1], nullptr, 10);
    if (name == "--cases")
      cases = v;
    else if (name == "--seed")
      seed = v;
    else if (name == "--from")
      from = v;
    else {
      std::fprintf(stderr, "usage: codec_fuzz [--cases N] [--seed S] [--from I]\n");
      return 2;
    }
  }
  current_seed = seed;
  for (uint64_t i = from; i < from + cases; ++i) {
    current_case = i;
    Random r{seed * 0x2545f4914f6cdd1dull + i * 0x9e3779b97f4a7c15ull};
    r.next();
    const uint64_t most = r.chance(90) ? 200 : r.chance(90) ? 3000 : 40000;
    const uint64_t which = r.below(10);
    try {
      if (which < 3)
        round_trip(r, most);
      else if (which == 3 && r.chance(20))
        many(r, most);
      else if (which < 8)
        mutation(r, most);
      else
        raw_bytes(r, most);
    } catch (const std::exception& e) {
      failure(std::string("an exception of another kind: ") + e.what());
    }
    if ((i + 1) % 500000 == 0) {
      std::printf("%llu cases\n", static_cast<unsigned long long>(i + 1));
      std::fflush(stdout);
    }
  }
  struct rusage u;
  getrusage(RUSAGE_SELF, &u);
  std::printf("%llu cases, seed %llu, peak memory %ld MiB, no failure\n",
              static_cast<unsigned long long>(cases), static_cast<unsigned long long>(seed),
              u.ru_maxrss / 1024);
  for (const auto& [name, n] : tally)
    std::printf("  %-28s %llu\n", name.c_str(), static_cast<unsigned long long>(n));
  return 0;
}
