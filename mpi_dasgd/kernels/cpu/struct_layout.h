// Sizes and offsets of the structs that Python mirrors, as text, so that a test can compare them.
#ifndef MPD_CPU_STRUCT_LAYOUT_H
#define MPD_CPU_STRUCT_LAYOUT_H
#include <cstddef>
#include <string>

#include "../layout.h"

// Lines "NAME VALUE" and "STRUCT.FIELD OFFSET SIZE".
class StructLayout {
 public:
  void value(const char* name, size_t number) {
    text_ += std::string(name) + " " + std::to_string(number) + "\n";
  }
  void field(const char* name, size_t offset, size_t size) {
    text_ += std::string(name) + " " + std::to_string(offset) + " " + std::to_string(size) + "\n";
  }
  const char* text() const { return text_.c_str(); }

 private:
  std::string text_;
};

#define MPD_STRUCT(layout, type) (layout).value(#type, sizeof(type))
#define MPD_FIELD(layout, type, name) \
  (layout).field(#type "." #name, offsetof(type, name), sizeof(type::name))
#define MPD_VALUE(layout, name) (layout).value(#name, static_cast<size_t>(name))

// What layout.h declares.
inline void describe_layout(StructLayout& layout) {
  MPD_VALUE(layout, MPD_BUCKET);
  MPD_STRUCT(layout, MpdEncodedVector);
  MPD_FIELD(layout, MpdEncodedVector, codes);
  MPD_FIELD(layout, MpdEncodedVector, scales);
  MPD_FIELD(layout, MpdEncodedVector, checksums);
  MPD_FIELD(layout, MpdEncodedVector, seed);
  MPD_FIELD(layout, MpdEncodedVector, nearest);
  MPD_STRUCT(layout, MpdBucketStats);
  MPD_FIELD(layout, MpdBucketStats, rejected);
  MPD_FIELD(layout, MpdBucketStats, max_d2);
  MPD_FIELD(layout, MpdBucketStats, sum_d2);
}

#endif
