// The first 64 bytes of a message: Header of codecs/message.py.
#ifndef MPD_CPU_MESSAGE_HEADER_H
#define MPD_CPU_MESSAGE_HEADER_H
#include <cstdint>

#pragma pack(push, 1)
struct MpdMessageHeader {
  uint32_t magic;
  uint16_t version, codec;
  int32_t rank, unused;
  int64_t step, time_ns, elements, nbytes;
  uint64_t seed;
  int64_t sequence;  // number among the messages of its sender to this receiver
};
#pragma pack(pop)

inline MpdMessageHeader* header_of(uint8_t* message) {
  return reinterpret_cast<MpdMessageHeader*>(message);
}

#endif
