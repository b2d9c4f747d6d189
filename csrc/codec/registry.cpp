// Every codec, one row each. The id is in the blobs: never change or reuse one.
#include "codec/codec.h"

namespace actzip::codec {

const std::vector<const Codec*>& codecs() {
  static const std::vector<const Codec*> all = {
      &kRaw,      // 0
      &kSeg,      // 1
      &kEg,       // 2
      &kHuffman,  // 3
      &kZvc,      // 4
      &kEbpc,     // 5
      &kRans,     // 6
  };
  return all;
}

const Codec* find_codec(const std::string& name) {
  for (const Codec* c : codecs())
    if (name == c->name) return c;
  return nullptr;
}

const Codec* find_codec(uint8_t id) {
  for (const Codec* c : codecs())
    if (id == c->id) return c;
  return nullptr;
}

}  // namespace actzip::codec
