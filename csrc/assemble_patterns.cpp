// Every coalition's feature map out of those of the periodic masks; the definition is infoutil_fast/ops.py::assemble_patterns.
//
// One band of map rows of one image, under all patterns, stays in the cache while all coalitions are gathered from it. Values are only
// moved: copies of runs of pixels, side by side in one map row, that come from the same pattern.
#include <memory>

#include "arrays.h"

namespace {

// Bytes of a band under all patterns: half of a core's second cache, since the writes pass through it too. Stores that bypass the caches
// were faster by themselves, but not together with a reader of the result.
constexpr int64_t CACHED = 512 << 10;

// Pixels side by side that lie in one block column, in bytes of a map row.
struct Piece {
    int64_t begin, end;
    int32_t col;
};

// Pieces side by side that come from one pattern.
struct Run {
    int64_t begin, end;
    int32_t pattern;
};

struct Job {
    int64_t B, P, M, H, R, S, line;  // line: bytes of a map row, W * C elements
    const char *maps;                // [B, P, H, line]
    const int32_t *index, *row;      // [M, R, S], [H]
    const std::vector<Piece> &pieces;
    char *out;  // [B, M, H, line]
};

// Items are ordered (image, band, coalition), so that a part of them reads few bands.
void write(const Job &job, int64_t rows, int64_t begin, int64_t end, Run *runs) {
    const int64_t bands = (job.H + rows - 1) / rows;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t m = item % job.M, band = item / job.M % bands, b = item / job.M / bands;
        const char *from = job.maps + b * job.P * job.H * job.line;
        char *to = job.out + (b * job.M + m) * job.H * job.line;
        int64_t n = 0;
        for (int64_t y = band * rows; y < std::min(job.H, (band + 1) * rows); ++y) {
            if (n == 0 || job.row[y] != job.row[y - 1]) {
                const int32_t *patterns = job.index + (m * job.R + job.row[y]) * job.S;
                n = 0;
                for (const Piece &piece : job.pieces)
                    if (n && runs[n - 1].pattern == patterns[piece.col]) runs[n - 1].end = piece.end;
                    else runs[n++] = {piece.begin, piece.end, patterns[piece.col]};
            }
            for (int64_t i = 0; i < n; ++i) {
                const char *source = from + (runs[i].pattern * job.H + y) * job.line + runs[i].begin;
                copy_onwards(to + y * job.line + runs[i].begin, source, runs[i].end - runs[i].begin);
            }
        }
    }
}

using Int32 = py::array_t<int32_t, py::array::c_style>;

py::array assemble_patterns(const py::array &maps, const Int32 &index, const Int32 &row, const Int32 &col, int64_t images,
                            const py::object &out, int64_t threads) {
    const int64_t C = maps.shape(1), H = maps.shape(2), W = maps.shape(3), M = index.shape(0), size = maps.itemsize(), line = W * C * size;
    const py::array packed = py::array::ensure(maps.attr("transpose")(0, 2, 3, 1), py::array::c_style);  // no copy if channels_last
    py::array result = out.is_none() ? py::array(maps.dtype(), {images * M, C, H, W}, {H * line, size, line, C * size})
                                     : out.cast<py::array>();
    if (result.size() == 0) return result;
    std::vector<Piece> pieces;
    for (int64_t x = 0; x < W; ++x)
        if (x && col.at(x) == col.at(x - 1)) pieces.back().end += C * size;
        else pieces.push_back({x * C * size, (x + 1) * C * size, col.at(x)});
    const int64_t P = maps.shape(0) / images;
    const Job job{images,       P,          M,      H, index.shape(1), index.shape(2), line, static_cast<const char *>(packed.data()),
                  index.data(), row.data(), pieces, static_cast<char *>(result.mutable_data())};
    const py::gil_scoped_release release;
    const int64_t rows = std::clamp<int64_t>(CACHED / (P * line), 1, H);
    const int64_t items = images * ((H + rows - 1) / rows) * M;
    each_part(threads, threads, [&](int64_t t) {
        const std::unique_ptr<Run[]> runs(new Run[pieces.size()]);
        write(job, rows, items * t / threads, items * (t + 1) / threads, runs.get());
    });
    return result;
}

}  // namespace

void bind_assemble_patterns(py::module_ &m) {
    m.def("assemble_patterns", &assemble_patterns, py::arg("maps"), py::arg("index"), py::arg("row"), py::arg("col"), py::arg("images"),
          py::arg("out"), py::arg("threads"));
}
