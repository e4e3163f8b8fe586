// The plugin's kernels on the host, tile by tile: what the double runs for a launch.
#pragma once

#include "operator/tables.h"

#include <array>
#include <cstdint>
#include <string>
#include <vector>

// The kernel whose module this is, out of the tables that the double was built with; null if there is none.
moee::Kernel const* findKernel(std::string const& image, std::string const& symbol);

// One launch with its arguments by value, as the driver takes them.
class Call {
public:
    Call(moee::Kernel const& kernel, unsigned const* grid, void** args);
    void run() const;
    bool hasNoScratch() const { return mValues[static_cast<size_t>(moee::Arg::kScratch)] == 0; }

private:
    template <typename T>
    T* at(moee::Arg arg) const { return reinterpret_cast<T*>(mValues[static_cast<size_t>(arg)]); }
    int64_t number(moee::Arg arg) const { return static_cast<int32_t>(mValues[static_cast<size_t>(arg)]); }
    int64_t rows() const { return int64_t{mGrid[0]} * mKernel->m; }
    int64_t columns() const { return int64_t{mGrid[1]} * mKernel->n; }
    std::vector<float> const& row(moee::Arg arg, int64_t index, int64_t length) const;
    double value(moee::Arg arg, int64_t index) const;
    void put(moee::Arg arg, int64_t index, double value) const;
    // Calls visit(expert, slot) for every slot of the buckets whose tile the grid has.
    template <typename Visit>
    void eachSlot(Visit const& visit) const;

    void route() const;
    std::vector<int32_t> choose(int64_t token) const;
    std::vector<int32_t> chooseByLoad(int64_t token) const;
    std::vector<double> hiddenRow(int64_t expert, int64_t token, int64_t begin, int64_t width) const;
    void up() const;
    void down() const;
    void downRow(int64_t expert, int64_t slot) const;
    void fused() const;
    void fusedRow(int64_t expert, int64_t token, int64_t slot) const;
    // fake_groups.cpp
    std::vector<int32_t> groupRoutes() const;
    template <typename Visit>
    void eachRow(Visit const& visit) const;
    void groupUp() const;
    void groupDown() const;
    void groupFused() const;
    void maskedUp() const;
    void maskedDown() const;
    void combine() const;
    void finish(int64_t expert, int64_t slot, std::vector<double> sums) const;
    void storeOutput(int64_t row, std::vector<double> const& sums) const;
    void overrun() const;

    moee::Kernel const* mKernel;
    std::array<unsigned, 3> mGrid;
    std::array<uint64_t, static_cast<size_t>(moee::Arg::kByLoad) + 1> mValues{};
};
