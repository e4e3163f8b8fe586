// moee_preprocess: one image to the network's input, as raw float32. Shows what moee_run feeds the engine; needs no GPU.
#include "preprocess.h"

#include <cstdio>
#include <exception>
#include <fstream>

int main(int count, char** words) {
    if (count != 4) {
        std::fprintf(stderr, "usage: moee_preprocess preprocess.txt IMAGE.ppm OUT.raw\n");
        return 2;
    }
    try {
        moee::Recipe const recipe = moee::readRecipe(words[1]);
        std::vector<float> values(recipe.elements());
        moee::prepare(moee::readPpm(words[2]), recipe, values.data());
        std::ofstream out(words[3], std::ios::binary);
        out.write(reinterpret_cast<char const*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(float)));
        if (!out.flush()) {
            std::fprintf(stderr, "moee_preprocess: %s cannot be written\n", words[3]);
            return 2;
        }
        std::printf("float32 [3, %d, %d]\n", recipe.size.height, recipe.size.width);
    } catch (std::exception const& error) {
        std::fprintf(stderr, "moee_preprocess: %s\n", error.what());
        return 2;
    }
    return 0;
}
