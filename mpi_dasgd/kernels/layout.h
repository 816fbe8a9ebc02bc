// Memory layout of encoded vectors: what the CPU library, the CUDA kernels and Python share. Python
// mirrors the structs and MPD_BUCKET in kernels/encoded.py; tests/kernels/test_struct_layout.py
// compares sizes and offsets. No include: NVRTC has none.
//
// A vector is encoded in buckets of 1024 elements. The last bucket is stored whole, even if it is
// partly empty. Codes have b = 4, 8 or 16 bits:
//
//     b = 16   2048 bytes per bucket: little-endian half-word j is the code of element j
//     b = 8    1024 bytes per bucket: byte j is the code of element j
//     b = 4     512 bytes per bucket, in 4 groups of 128 bytes, each holding 256 codes.
//               Byte i of group g holds element 256 g + i in its low half and element
//               256 g + 128 + i in its high half. Group 0:
//
//                   byte            0           1                127
//                   bits         7..4 3..0   7..4 3..0   ...   7..4 3..0
//                              +----------+-----------+-----+-----------+
//                   element    |  128   0 |  129    1 | ... |  255  127 |
//                              +----------+-----------+-----+-----------+
//
//               So a register of consecutive bytes unpacks, by one mask and one shift, to two
//               registers of consecutive elements: no shuffle is needed.
#ifndef MPD_LAYOUT_H
#define MPD_LAYOUT_H

typedef unsigned int mpd_u32;
typedef unsigned long long mpd_u64;

// Counted up when a struct or a function of the CPU library changes; native.py has the same number,
// and loads no library of another one.
#define MPD_ABI 2

#define MPD_BUCKET 1024  // elements that share a scale and a checksum

// A publication (a model) or a delta.
struct MpdEncodedVector {
  void* codes;         // as drawn above; null in MpdKernelArguments: there is no such vector
  float* scales;       // per bucket; in a delta its unit: signed, and 0 if the bucket was rejected
  mpd_u32* checksums;  // per bucket
  mpd_u64 seed;        // the dither and the checksums depend on it
  long long nearest;   // whether codes are rounded to the nearest instead of with dither
};

// Statistics of the codes of one bucket.
struct MpdBucketStats {
  mpd_u32
      rejected;    // 1 if the bucket failed its checksum or its range: the model was left unchanged
  mpd_u32 max_d2;  // largest squared distance in units of the scale; 0 if rejected
  mpd_u64 sum_d2;  // sum of the squared distances, likewise
};

#endif
