// The pair exchange of a rank of a node: the lines of algorithms/pair_averaging.py and of the codecs
// `lattice` and `none`, in their order.
#include "pair_exchange.h"

#include <chrono>
#include <cmath>
#include <limits>

#include "fused_step.h"
#include "message_header.h"

extern "C" void mpd_fused_step(const MpdFusedStep* step);
extern "C" void mpd_pair_average_f32(float* x, int64_t n, const float* const* deltas,
                                     int delta_count, const float* partner_model, double weight,
                                     float* reply_delta, float* publication,
                                     const MpdOptimizer* optimizer, int threads);

class MpdPairExchange {
 public:
  explicit MpdPairExchange(const MpdPairExchangeSetup& setup) : setup_(setup), node_(*setup.node) {
    if (codec_.bits != 0) stats_.resize(codec_.scale->buckets);
  }

  // PairExchange.exchange: 1 if there was a partner, 0 if not.
  int64_t exchange(float* x, int64_t step, bool publishes, const MpdOptimizer* optimizer,
                   bool refuses, const int64_t* candidates, int64_t count) {
    if (!has_room()) return kNoRoom;
    Pass pass(x, step, optimizer, refuses);
    receive(&pass);
    begin(candidates, count, &pass);
    if (publishes) reserve_publication(&pass);
    if (const int64_t failure = average(&pass)) return failure;
    if (!free_received(pass)) return kForeignSwap;
    commit(pass);
    return publish(pass) ? pass.partner_model != nullptr : kForeignSwap;
  }

  // PairExchange.absorb: the number of deltas.
  int64_t absorb(float* x, int64_t step, bool publishes) {
    if (!has_room()) return kNoRoom;
    Pass pass(x, step, nullptr, false);
    receive(&pass);
    const auto count = static_cast<int64_t>(node_.arrivals().size());
    if (count == 0) return 0;
    if (publishes) reserve_publication(&pass);
    if (const int64_t failure = average(&pass)) return failure;
    return free_received(pass) && publish(pass) ? count : kForeignSwap;
  }

  // NeighbourExchange.publish: 1 if a slot was free, 0 if not.
  int64_t publish_vector(float* x, int64_t step, const MpdOptimizer* optimizer, bool refuses) {
    Pass pass(x, step, optimizer, refuses);
    reserve_publication(&pass);
    if (pass.publication == nullptr && optimizer == nullptr) return 0;
    if (const int64_t failure = average(&pass)) return failure;
    return publish(pass) ? pass.publication != nullptr : kForeignSwap;
  }

  MpdPairResult result() const { return result_; }

 private:
  // One exchange; messages are null where there is none.
  struct Pass {
    Pass(float* model, int64_t local_step, const MpdOptimizer* update, bool refuses_nonfinite)
        : x(model), step(local_step), optimizer(update), refuses(refuses_nonfinite) {}
    float* x;
    int64_t step;
    const MpdOptimizer* optimizer;
    bool refuses;  // a model that is not finite behind the optimizer's step
    bool absorbs = false;
    MpdClaim claim{};
    int64_t place = 0, failed_attempts = 0;  // slot of the partner's inbox; candidates that failed
    uint8_t *partner_model = nullptr, *reply_delta = nullptr, *publication = nullptr;
    MpdObserved observed{std::numeric_limits<double>::quiet_NaN(), 0};
  };

  // The records are written where nothing can be undone any more.
  bool has_room() const { return mpd_record_room(setup_.records) > node_.inbox_slots(); }

  void receive(Pass* pass) {
    node_.receive();
    pass->absorbs = true;
  }

  // Claims one of the candidates: RmaEndpoint.begin_exchange.
  void begin(const int64_t* candidates, int64_t count, Pass* pass) {
    for (int64_t i = 0; i < count; ++i) {
      if (node_.claim(candidates[i], &pass->claim)) {
        pass->place = node_.reserve(candidates[i]);
        if (pass->place >= 0) {
          node_.fence();
          node_.counters().bytes_received += node_.nbytes();
          pass->partner_model = node_.publication_slot(pass->claim.rank, pass->claim.slot);
          pass->reply_delta = node_.inbox_slot(pass->claim.rank, pass->place);
          return;
        }
        node_.release(pass->claim);
      }
      ++pass->failed_attempts;
    }
  }

  void reserve_publication(Pass* pass) {
    const int64_t slot = node_.reserve_publication();
    if (slot >= 0) pass->publication = node_.publication_slot(node_.rank(), slot);
  }

  uint8_t* received(int64_t i) const {
    return node_.inbox_slot(node_.rank(), node_.arrivals()[i].slot);
  }
  int64_t received_count(const Pass& pass) const {
    return pass.absorbs ? static_cast<int64_t>(node_.arrivals().size()) : 0;
  }

  // Makes the pass over memory; returns 0, or a failure.
  int64_t average(Pass* pass) {
    const int64_t count = received_count(*pass);
    for (int64_t i = 0; i < count; ++i)
      if (!is_good(received(i)))
        return bad_message(node_.rank(), node_.publication_slots() + node_.arrivals()[i].slot);
    if (pass->partner_model != nullptr && !is_good(pass->partner_model))
      return bad_message(pass->claim.rank, pass->claim.slot);
    if (codec_.bits != 0)
      average_on_lattice(pass, count);
    else
      average_elements(*pass, count);
    if (!pass->refuses || *pass->optimizer->nonfinite == 0) return 0;
    if (pass->partner_model != nullptr) {
      node_.cancel(pass->claim.rank, pass->place);
      node_.release(pass->claim);
    }
    return free_received(*pass) ? kDiverged : kForeignSwap;
  }

  bool is_good(uint8_t* message) const {
    const MpdMessageHeader& header = *header_of(message);
    return header.magic == codec_.magic && header.version == codec_.version &&
           header.codec == codec_.codec && header.elements == codec_.elements &&
           header.nbytes == codec_.nbytes;
  }
  int64_t bad_message(int64_t rank, int64_t slot) {
    result_ = {rank, slot};
    return kBadMessage;
  }

  // LatticeCodec.average_pair.
  void average_on_lattice(Pass* pass, int64_t count) {
    MpdFusedStep step{};
    step.bits = codec_.bits;
    step.x = pass->x;
    step.elements = codec_.elements;
    step.optimizer = pass->optimizer;
    step.weight = static_cast<float>(setup_.weight);
    step.threads = static_cast<int32_t>(codec_.threads);
    while (static_cast<int64_t>(delta_stats_.size()) < count)
      delta_stats_.emplace_back(codec_.scale->buckets);
    deltas_.clear();
    delta_pointers_.clear();
    stats_pointers_.clear();
    for (int64_t i = 0; i < count; ++i) deltas_.push_back(vector_of(received(i)));
    for (int64_t i = 0; i < count; ++i) {
      delta_pointers_.push_back(&deltas_[i]);
      stats_pointers_.push_back(delta_stats_[i].data());
    }
    step.deltas = delta_pointers_.data();
    step.delta_stats = stats_pointers_.data();
    step.delta_count = count;
    MpdEncodedVector partner_model, reply_delta, publication;
    if (pass->partner_model != nullptr) {
      step.partner_model = &(partner_model = vector_of(pass->partner_model));
      step.stats = stats_.data();
      step.reply_delta = &(reply_delta = new_vector(pass->reply_delta));
    }
    if (pass->publication != nullptr) {
      step.publication = &(publication = new_vector(pass->publication));
      if (pass->optimizer != nullptr && mpd_measures_next(*codec_.scale)) {
        make_step_alone(*pass);  // what is measured is behind it
        step.optimizer = nullptr;
      }
      mpd_next_scales(codec_.scale, pass->x, codec_.elements, publication.scales);
    }
    mpd_fused_step(&step);
    for (int64_t i = 0; i < count; ++i)
      mpd_observe_delta(codec_, delta_stats_[i].data(), deltas_[i].scales, setup_.weight);
    if (pass->partner_model != nullptr)
      pass->observed = mpd_observe_publication(codec_, stats_.data(), partner_model.scales);
  }

  void make_step_alone(const Pass& pass) const {
    MpdFusedStep step{};
    step.bits = codec_.bits;
    step.x = pass.x;
    step.elements = codec_.elements;
    step.optimizer = pass.optimizer;
    step.threads = static_cast<int32_t>(codec_.threads);
    mpd_fused_step(&step);
  }

  MpdEncodedVector vector_of(uint8_t* message) const {
    return {message + codec_.payload_at, reinterpret_cast<float*>(message + codec_.scales_at),
            reinterpret_cast<uint32_t*>(message + codec_.checksums_at), header_of(message)->seed,
            codec_.nearest};
  }
  MpdEncodedVector new_vector(uint8_t* message) const {
    header_of(message)->seed = codec_.seeds->start + static_cast<uint64_t>(++codec_.seeds->drawn);
    return vector_of(message);
  }

  // NoCodec.average_pair.
  void average_elements(const Pass& pass, int64_t count) {
    payloads_.clear();
    for (int64_t i = 0; i < count; ++i) payloads_.push_back(payload_of(received(i)));
    mpd_pair_average_f32(pass.x, codec_.elements, payloads_.data(), static_cast<int>(count),
                         payload_of(pass.partner_model), setup_.weight,
                         payload_of(pass.reply_delta), payload_of(pass.publication), pass.optimizer,
                         static_cast<int>(codec_.threads));
  }

  float* payload_of(uint8_t* message) const {
    return message == nullptr ? nullptr : reinterpret_cast<float*>(message + codec_.payload_at);
  }

  // PairExchange._free; false if another rank has changed a word.
  bool free_received(const Pass& pass) {
    const int64_t count = received_count(pass);
    for (int64_t i = 0; i < count; ++i) {
      const MpdMessageHeader header = *header_of(received(i));
      if (!node_.free(node_.arrivals()[i])) return false;
      mpd_record_exchange(setup_.records, MPD_ABSORBED, pass.step, header.rank, header.step,
                          header.time_ns, time_ns(), 0, 0, std::numeric_limits<double>::quiet_NaN(),
                          0);
    }
    return true;
  }

  // PairExchange.commit.
  void commit(const Pass& pass) {
    if (pass.partner_model == nullptr) {
      ++node_.counters().skipped;
      mpd_record_skip(setup_.records, pass.step, static_cast<int32_t>(pass.failed_attempts));
      return;
    }
    // The header is read before the release of the publication's slot.
    const MpdMessageHeader header = *header_of(pass.partner_model);
    const int64_t now = time_ns();
    stamp(pass.reply_delta, pass.step, now);
    node_.send(pass.claim.rank, pass.place);
    node_.release(pass.claim);
    mpd_record_exchange(setup_.records, MPD_INITIATED, pass.step, header.rank, header.step,
                        header.time_ns, now, header.nbytes + codec_.nbytes,
                        static_cast<int32_t>(pass.failed_attempts), pass.observed.distance,
                        static_cast<int32_t>(pass.observed.rejected));
  }

  bool publish(const Pass& pass) {
    if (pass.publication == nullptr) return true;
    stamp(pass.publication, pass.step, time_ns());
    return node_.publish();
  }

  // Message.stamp: all but the seed and the number.
  void stamp(uint8_t* message, int64_t step, int64_t now) const {
    MpdMessageHeader* header = header_of(message);
    header->magic = static_cast<uint32_t>(codec_.magic);
    header->version = static_cast<uint16_t>(codec_.version);
    header->codec = static_cast<uint16_t>(codec_.codec);
    header->rank = static_cast<int32_t>(node_.rank());
    header->unused = 0;
    header->step = step;
    header->time_ns = now;
    header->elements = codec_.elements;
    header->nbytes = codec_.nbytes;
  }

  static int64_t time_ns() {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
  }

  MpdPairExchangeSetup setup_;
  MpdNodeRank& node_;
  const MpdPairCodec& codec_ = setup_.codec;
  MpdPairResult result_{};
  std::vector<MpdBucketStats> stats_;
  std::vector<std::vector<MpdBucketStats>> delta_stats_;
  std::vector<MpdEncodedVector> deltas_;
  std::vector<const MpdEncodedVector*> delta_pointers_;
  std::vector<MpdBucketStats*> stats_pointers_;
  std::vector<const float*> payloads_;
};

extern "C" {

MpdPairExchange* mpd_pair_create(const MpdPairExchangeSetup* setup) {
  return new MpdPairExchange(*setup);
}

void mpd_pair_destroy(MpdPairExchange* exchange) { delete exchange; }

int64_t mpd_pair_exchange(MpdPairExchange* exchange, float* x, int64_t step, int64_t publishes,
                          const MpdOptimizer* optimizer, int64_t refuses, const int64_t* candidates,
                          int64_t count) {
  return exchange->exchange(x, step, publishes != 0, optimizer, refuses != 0, candidates, count);
}

int64_t mpd_pair_absorb(MpdPairExchange* exchange, float* x, int64_t step, int64_t publishes) {
  return exchange->absorb(x, step, publishes != 0);
}

// `refuses`: whether a model that is not finite behind the optimizer's step is kDiverged.
int64_t mpd_pair_publish(MpdPairExchange* exchange, float* x, int64_t step,
                         const MpdOptimizer* optimizer, int64_t refuses) {
  return exchange->publish_vector(x, step, optimizer, refuses != 0);
}

int64_t mpd_pair_result(MpdPairExchange* exchange, MpdPairResult* result) {
  *result = exchange->result();
  return 0;
}
}
