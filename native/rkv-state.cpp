// Save and restore of a cache with a budget.
//
// A state is a header, which says in words what it is of, and one block per sequence: its cells' metadata, then the rows
// of K, V, positions and stored floats, and the query ring. The header, each block's metadata and each block end with a
// CRC-32 of what came before. A block goes into the cache only when all of it was read and found right.

#include "rkv-cache.h"
#include "rkv-init.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <cinttypes>
#include <cstring>
#include <functional>
#include <stdexcept>

static constexpr uint32_t STATE_MAGIC   = 0x53564b52; // "RKVS"
static constexpr uint32_t STATE_VERSION = 4;
static constexpr uint32_t MAX_TEXT      = 4096;       // of one line of the header

namespace {

[[noreturn]] void fail(const std::string & why) {
    rkv_set_error("%s", why.c_str());
    throw std::runtime_error(rkv_last_error());
}

// CRC-32 (IEEE 802.3), eight bytes per step
struct crc32 {
    uint32_t value = 0;

    void add(const void * src, size_t n) {
        static const auto tables = [] {
            std::array<std::array<uint32_t, 256>, 8> t = {};
            for (uint32_t i = 0; i < 256; ++i) {
                uint32_t c = i;
                for (int bit = 0; bit < 8; ++bit) {
                    c = (c >> 1) ^ (c & 1 ? 0xedb88320u : 0);
                }
                t[0][i] = c;
            }
            for (size_t s = 1; s < t.size(); ++s) {
                for (uint32_t i = 0; i < 256; ++i) {
                    t[s][i] = (t[s - 1][i] >> 8) ^ t[0][t[s - 1][i] & 0xff];
                }
            }
            return t;
        }();
        const auto * p = static_cast<const uint8_t *>(src);
        uint32_t c = ~value;
        for (; n >= 8; n -= 8, p += 8) {
            const uint32_t lo = c ^ (p[0] | p[1] << 8 | p[2] << 16 | (uint32_t) p[3] << 24);
            c = tables[7][lo & 0xff] ^ tables[6][lo >> 8 & 0xff] ^ tables[5][lo >> 16 & 0xff] ^ tables[4][lo >> 24] ^
                tables[3][p[4]] ^ tables[2][p[5]] ^ tables[1][p[6]] ^ tables[0][p[7]];
        }
        for (; n > 0; --n, ++p) {
            c = (c >> 8) ^ tables[0][(c ^ *p) & 0xff];
        }
        value = ~c;
    }
};

struct writer {
    llama_io_write_i & io;
    crc32 sum = {};

    void raw(const void * src, size_t n) {
        sum.add(src, n);
        io.write(src, n);
    }
    template <typename T> void put(const T & x) { raw(&x, sizeof(x)); }
    void text(const std::string & s) {
        const uint32_t n = std::min<size_t>(s.size(), MAX_TEXT);
        put(n);
        raw(s.data(), n);
    }
    void seal() {
        const uint32_t value = sum.value;
        io.write(&value, sizeof(value));
        sum = {};
    }
};

struct reader {
    llama_io_read_i & io;
    crc32 sum = {};

    void fetch(void * dst, size_t n) {
        try {
            io.read(dst, n);
        } catch (const std::exception &) {
            fail("the state is damaged: it ends too early");
        }
    }
    void raw(void * dst, size_t n) {
        fetch(dst, n);
        sum.add(dst, n);
    }
    template <typename T> T get() {
        T x;
        raw(&x, sizeof(x));
        return x;
    }
    std::string text() {
        const uint32_t n = get<uint32_t>();
        if (n > MAX_TEXT) {
            fail("the state is damaged: its header makes no sense");
        }
        std::string s(n, ' ');
        raw(&s[0], n);
        return s;
    }
    void check(const char * what) {
        uint32_t value;
        fetch(&value, sizeof(value));
        if (value != sum.value) {
            fail(format("the state is damaged: the checksum of %s is wrong", what));
        }
        sum = {};
    }
};

// "0-9: A, 10-29: B", or just "A" where all are the same
std::string by_layer(const std::vector<rkv_cache::layer_t> & layers, const std::function<std::string(const rkv_cache::layer_t &)> & of) {
    std::vector<std::string> runs;
    for (size_t i = 0; i < layers.size();) {
        const std::string value = of(layers[i]);
        size_t end = i + 1;
        while (end < layers.size() && of(layers[end]) == value) {
            ++end;
        }
        if (i == 0 && end == layers.size()) {
            return value;
        }
        runs.push_back(format("layers %u-%u: %s", layers[i].il, layers[end - 1].il, value.c_str()));
        i = end;
    }
    std::string all;
    for (const auto & run : runs) {
        all += (all.empty() ? "" : ", ") + run;
    }
    return all;
}

std::string number(double x) { return format("%.9g", x); }

} // namespace

// What a state's rows and its later compactions depend on: name and value. The same in the file and here, or refused.
std::vector<std::pair<std::string, std::string>> rkv_cache::state_traits() const {
    if (!traits.empty()) {
        return traits;
    }
    const llama_hparams & hp = model.hparams;

    const rkv_op_params op = rkv_policy_op(params);

    crc32 norm;
    if (model.output_norm && model.output_norm->buffer) {
        std::vector<uint8_t> data(ggml_nbytes(model.output_norm));
        ggml_backend_tensor_get(model.output_norm, data.data(), 0, data.size());
        norm.add(data.data(), data.size());
    }
    const auto add = [this](const char * name, const std::string & value) {
        if (value.size() <= MAX_TEXT) {
            traits.emplace_back(name, value);
            return;
        }
        crc32 all;
        all.add(value.data(), value.size());
        traits.emplace_back(name, value.substr(0, MAX_TEXT - 16) + format(" (%08x)", all.value));
    };

    add("the model shape", by_layer(layers, [&](const layer_t & l) {
        return format("%d/%d heads of %u/%u", l.n_head, l.n_head_kv, hp.n_embd_head_k(l.il), hp.n_embd_head_v(l.il));
    }));
    add("the RoPE", by_layer(layers, [&](const layer_t & l) {
        return hp.has_rope(l.il) ? format("%u dimensions, base %s, scale %s", hp.n_rot(l.il),
            number(model.get_rope_freq_base(*cparams, l.il)).c_str(), number(model.get_rope_freq_scale(*cparams, l.il)).c_str()) : "none";
    }) + format(", YaRN %s/%s/%s/%s over %u", number(cparams->yarn_ext_factor).c_str(), number(cparams->yarn_attn_factor).c_str(),
        number(cparams->yarn_beta_fast).c_str(), number(cparams->yarn_beta_slow).c_str(), cparams->n_ctx_orig_yarn));
    add("the model", format("%s %s (%" PRIu64 " weights, checksum %08x)", model.arch_name().c_str(), model.name.c_str(),
        model.n_elements(), norm.value));
    add("the K cache type", by_layer(layers, [](const layer_t & l) { return std::string(ggml_type_name(l.k->type)); }));
    add("the V cache type", by_layer(layers, [](const layer_t & l) { return std::string(l.v ? ggml_type_name(l.v->type) : "none"); }));
    add("flash attention", v_transposed() ? "off" : "on");
    add("the cache's rotation", format("%d/%d", kv.attn_rot_k, kv.attn_rot_v));
    add("the policy", rkv_policy_name(params.policy));
    add("a budget of", by_layer(layers, [&](const layer_t & l) { return std::to_string(groups[l.group].budget); }) + " cells");
    add("a buffer of", std::to_string(params.buffer) + " tokens");
    add("a window of", std::to_string(params.window) + " tokens");
    add("recent",      by_layer(layers, [&](const layer_t & l) { return std::to_string(recent(groups[l.group])); }) + " tokens");
    add("pin",         std::to_string(params.pin));
    add("pool",        std::to_string(params.pool));
    add("lambda",      number(params.lambda));
    add("threshold",   number(params.threshold));
    add("n_sim",       std::to_string(op.n_sim));
    add("memory",      number(op.memory));
    add("chunk",       std::to_string(op.chunk));
    add("growth",      std::to_string(params.growth));
    add("value_share", number(params.value_share));
    add("value_weight", number(op.value_weight));
    add("seed",        std::to_string(params.seed));
    add("shared_heads", params.shared_heads ? "on" : "off");
    add("reference",   params.reference ? "on" : "off");
    return traits;
}

// The parts of the cache that hold a sequence's virtual rows [first, end), of which [first, old) went through a pass.
std::vector<rkv_cache::span_t> rkv_cache::state_spans(uint32_t strm, uint32_t first, uint32_t old, uint32_t end) const {
    std::vector<span_t> spans;
    for (const auto & l : layers) {
        const uint32_t off     = groups[l.group].off;
        const uint32_t begin   = std::max(first, off) - off;
        const uint32_t old_end = std::max(old, off + begin) - off;
        const size_t   n       = end - off - begin;
        const size_t   n_old   = old_end - begin;

        spans.push_back({ l.k, strm*l.k->nb[2] + begin*l.k->nb[1], n*l.k->nb[1], false });
        if (l.v && !v_transposed()) {
            spans.push_back({ l.v, strm*l.v->nb[2] + begin*l.v->nb[1], n*l.v->nb[1], false });
        }
        for (size_t j = 0; l.v && v_transposed() && j < hparams().n_embd_v_gqa(l.il); ++j) {
            const size_t el = ggml_type_size(l.v->type);
            spans.push_back({ l.v, strm*l.v->nb[2] + (j*l.v->ne[1] + begin)*el, n*el, false });
        }
        for (int32_t h = 0; n_old > 0 && h < l.n_head_kv; ++h) {
            spans.push_back({ l.pos, strm*l.pos->nb[2] + h*l.pos->nb[1] + begin*l.pos->nb[0], n_old*l.pos->nb[0], true });
            if (l.aux) {
                spans.push_back({ l.aux, strm*l.aux->nb[3] + h*l.aux->nb[2] + begin*l.aux->nb[1], n_old*l.aux->nb[1], false });
            }
        }
        spans.push_back({ l.q, strm*l.q->nb[2], params.window*l.q->nb[1], false }); // without the trash row
        if (l.stats && n_old > 0) {
            spans.push_back({ l.stats, strm*l.stats->nb[2], l.stats->nb[2], false });
        }
    }
    return spans;
}

void rkv_cache::state_write(llama_io_write_i & io, llama_seq_id seq_id) {
    if (seq_id != -1 && stream_of(seq_id) < 0) {
        fail(format("there is no sequence %d: the context has %u", seq_id, n_stream));
    }

    writer out { io };
    const auto lines = state_traits();
    out.put(STATE_MAGIC);
    out.put(STATE_VERSION);
    out.put<uint32_t>(seq_id == -1 ? n_stream : 0); // 0: a single sequence, for any id
    out.put<uint32_t>(lines.size());
    for (const auto & line : lines) {
        out.text(line.second);
    }
    out.seal();

    if (seq_id != -1) {
        write_stream(io, stream_of(seq_id));
    }
    for (uint32_t s = 0; seq_id == -1 && s < n_stream; ++s) {
        write_stream(io, s);
    }
}

void rkv_cache::write_stream(llama_io_write_i & io, uint32_t strm) {
    const auto &   c     = cells(strm);
    const auto &   st    = streams[strm];
    const uint32_t first = c.get_used() == 0 ? 0 : c.used_min();
    const uint32_t end   = c.get_used() == 0 ? 0 : c.used_max_p1();
    const uint32_t old   = std::min(st.old_end, end);

    writer out { io };
    out.put(first);
    out.put(end);
    if (end > 0) {
        out.put(old);
        out.put<int32_t>(st.exact);
        out.put<uint32_t>(st.compacted);
        out.put<int32_t>(st.pin);
        out.put<uint32_t>(st.passes);
        out.raw(st.ring.data(), st.ring.size()*sizeof(llama_pos));
        for (uint32_t r = first; r < end; ++r) {
            out.put<int32_t>(c.is_empty(r) ? -1 : c.pos_get(r)); // a removal left row r free
        }
        if (kv.has_cell_ext()) {
            for (uint32_t r = first; r < end; ++r) {
                out.put(c.is_empty(r) ? llama_kv_cell_ext() : c.ext_get(r));
            }
        }
    }
    out.seal();
    if (end == 0) {
        return;
    }
    std::vector<uint8_t> data;
    for (const span_t & span : state_spans(strm, first, old, end)) {
        data.resize(span.size);
        ggml_backend_tensor_get(span.t, data.data(), span.offset, span.size);
        out.raw(data.data(), data.size());
    }
    out.seal();
}

void rkv_cache::state_read(llama_io_read_i & io, llama_seq_id seq_id) {
    read = read_refused;
    rkv_set_error("%s", "");
    if (seq_id != -1 && stream_of(seq_id) < 0) {
        fail(format("there is no sequence %d: the context has %u", seq_id, n_stream));
    }

    reader in { io };
    if (in.get<uint32_t>() != STATE_MAGIC) {
        fail("the state was saved without a budget, or it is damaged");
    }
    const uint32_t version = in.get<uint32_t>();
    if (version != STATE_VERSION) {
        fail(format("the state has format version %u, this library reads version %u", version, STATE_VERSION));
    }
    const auto     own   = state_traits();
    const uint32_t n_seq = in.get<uint32_t>();
    if (in.get<uint32_t>() != own.size()) {
        fail("the state is damaged: its header makes no sense");
    }
    std::vector<std::string> theirs;
    for (size_t i = 0; i < own.size(); ++i) {
        theirs.push_back(in.text());
    }
    in.check("its header");
    for (size_t i = 0; i < own.size(); ++i) {
        if (theirs[i] != own[i].second) {
            for (char & ch : theirs[i]) { // it goes into one line of text
                ch = std::iscntrl((unsigned char) ch) ? '?' : ch;
            }
            fail(format("the state was saved with %s %.150s, this context has %.150s", own[i].first.c_str(), theirs[i].c_str(),
                own[i].second.c_str()));
        }
    }
    if ((n_seq == 0) != (seq_id != -1)) {
        fail(n_seq == 0 ? "the state holds a single sequence, not a whole context" : "the state holds a whole context, not a single sequence");
    }
    if (seq_id == -1 && n_seq != n_stream) {
        fail(format("the state holds %u sequences, this context has %u", n_seq, n_stream));
    }

    if (seq_id != -1) {
        read_stream(io, stream_of(seq_id));
    }
    for (uint32_t s = 0; seq_id == -1 && s < n_stream; ++s) {
        read_stream(io, s);
    }
}

// Replaces what a sequence holds, or throws and leaves it as it was.
void rkv_cache::read_stream(llama_io_read_i & io, uint32_t strm) {
    const auto damaged = [](const char * what) { fail(format("the state is damaged: %s", what)); };
    const llama_pos n_ctx = cparams->n_ctx_seq;

    stream_t st;
    st.ring.assign(params.window, -1);

    reader in { io };
    const uint32_t first = in.get<uint32_t>();
    const uint32_t end   = in.get<uint32_t>();
    if (first > end || (end > 0 && first == end)) {
        damaged("its rows are out of range");
    }
    if (end > n_cells()) {
        fail(format("the state needs %u cells, this context has %u: make it with the batch it was saved with", end, n_cells()));
    }
    std::vector<llama_pos>         pos;
    std::vector<llama_kv_cell_ext> ext;
    if (end > 0) {
        st.old_end   = in.get<uint32_t>();
        st.exact     = in.get<int32_t>();
        const uint32_t compacted = in.get<uint32_t>();
        st.compacted = compacted == 1;
        st.filled    = true;
        st.pin       = in.get<int32_t>();
        st.passes    = in.get<uint32_t>();
        in.raw(st.ring.data(), st.ring.size()*sizeof(llama_pos));
        pos.resize(end - first);
        in.raw(pos.data(), pos.size()*sizeof(llama_pos));
        if (kv.has_cell_ext()) {
            ext.resize(pos.size());
            in.raw(ext.data(), ext.size()*sizeof(llama_kv_cell_ext));
        }
        in.check("a sequence's cells");

        // what the rest of this code relies on
        if (end <= n_start || st.old_end > end || (st.old_end == 0 && first < n_start) || (st.old_end > 0 && st.old_end <= n_start)) {
            damaged("its rows are out of range");
        }
        if (st.pin < -1 || st.pin > (int64_t) (groups.back().budget - recent(groups.back()) - 1)) {
            damaged("its pinned cells are out of range");
        }
        if (compacted > 1 || (st.compacted && st.old_end == 0) || st.exact < 0) {
            damaged("its counters are out of range");
        }
        llama_pos last = -1;
        for (const llama_pos p : pos) {
            if (p < -1 || (p >= 0 && p <= last)) {
                damaged("its positions are not ascending");
            }
            last = std::max(last, p);
        }
        if (pos.front() < 0 || pos.back() < 0) {
            damaged("its rows are out of range");
        }
        if (last >= n_ctx) {
            fail(format("the state reaches position %d, this context ends at %d: raise n_ctx", last, n_ctx));
        }
        for (size_t i = 0; i < st.ring.size(); ++i) {
            if (st.ring[i] < -1 || (st.ring[i] >= 0 && (size_t) st.ring[i] % st.ring.size() != i)) {
                damaged("its query ring is out of range");
            }
        }
    } else {
        in.check("a sequence's cells");
    }

    std::vector<span_t>  spans;
    std::vector<uint8_t> data;
    if (end > 0) {
        spans = state_spans(strm, first, st.old_end, end);
        size_t size = 0;
        for (const span_t & span : spans) {
            size += span.size;
        }
        data.resize(size);
        in.raw(data.data(), size);
        in.check("a sequence's data");

        const uint8_t * src = data.data();
        for (const span_t & span : spans) {
            int32_t last = -1;
            for (size_t i = 0; span.positions && i < span.size/sizeof(int32_t); ++i) {
                int32_t p;
                memcpy(&p, src + i*sizeof(p), sizeof(p));
                if (p <= last || p >= n_ctx) {
                    damaged("a head's positions are not ascending");
                }
                last = p;
            }
            src += span.size;
        }
    }

    // nothing can fail from here on
    read = read_changed;
    const uint8_t * src = data.data();
    for (const span_t & span : spans) {
        ggml_backend_tensor_set(span.t, src, span.offset, span.size);
        src += span.size;
    }
    auto & c = kv.v_cells[strm];
    c.reset();
    for (uint32_t r = first; r < end; ++r) {
        if (pos[r - first] < 0) {
            continue;
        }
        c.pos_set(r, pos[r - first]);
        if (!ext.empty()) {
            c.ext_set(r, ext[r - first]);
        }
        c.seq_add(r, strm);
    }
    streams[strm] = st;
}

//
// called from llama_context
//

void rkv_state_read(llama_context & ctx, llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    rkv_cache * rkv = rkv_cache_of(&ctx);
    if (rkv) {
        rkv->read = rkv_cache::read_not_reached;
    }
    rkv_state_begin(ctx);
    try {
        ctx.get_memory()->state_read(io, seq_id, flags);
    } catch (const std::exception & err) {
        if (!rkv || rkv->read == rkv_cache::read_refused) { // as it was: this part comes first
            throw;
        }
        // some sequences were replaced, or another part of the memory: what is left would not belong together
        const std::string why = err.what();
        rkv_state_drop(ctx, seq_id);
        if (why.rfind("the state", 0) == 0) {
            throw std::runtime_error(why);
        }
        throw std::runtime_error("the state's window or recurrent part is damaged, or of other settings (swa_full, cache type): " + why);
    }
}

void rkv_state_check_length(uint32_t n_bytes) {
    if (n_bytes == 0 || n_bytes > MAX_TEXT) {
        fail("the state is damaged: its first text makes no sense");
    }
}

void rkv_state_begin(llama_context & ctx) {
    if (rkv_cache_of(&ctx)) {
        ctx.memory_update(false);
    }
}

void rkv_state_failed(const char * why) { rkv_set_error("%s", why); }

void rkv_state_drop(llama_context & ctx, llama_seq_id seq_id) {
    if (!rkv_cache_of(&ctx)) {
        return;
    }
    rkv_set_error("the state is damaged: more bytes follow it");
    if (seq_id < 0) {
        ctx.get_memory()->clear(true);
    } else {
        ctx.get_memory()->seq_rm(seq_id, -1, -1);
    }
}
