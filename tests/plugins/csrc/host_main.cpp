// Drives the plugin through good and bad calls under the sanitizers. Linked with the plugin's own objects; the driver is
// the test double, found as libcuda.so.1. With `fuzz SEED COUNT`: random input instead. Exits non-zero after printing each failed check.
#include "host_checks.h"

extern "C" void setLoggerFinder(ILoggerFinder* finder);
extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count);

int main(int argc, char** argv) {
    setLoggerFinder(&gLogger);
    int32_t count = 0;
    gCreator = static_cast<IPluginCreatorV3One*>(getCreators(count)[0]);
    CHECK(count == 1);
    if (argc > 1 && std::strcmp(argv[1], "without-driver") == 0) {
        checkWithoutDriver();
    } else {
        Fake const fake;
        if (fake.library == nullptr || dlsym(fake.library, "fake_reset") == nullptr) {
            std::printf("the test double is not on the library path\n");
            return 2;
        }
        if (argc > 3 && std::strcmp(argv[1], "fuzz") == 0) {
            fuzz(fake, std::strtoull(argv[2], nullptr, 10), std::strtoull(argv[3], nullptr, 10));
        } else {
            checkCreatorAndShapes();
            checkLifeCycle(fake);
            checkDriver(fake);
        }
    }
    std::printf("%d checks failed\n", gFailures);
    return gFailures == 0 ? 0 : 1;
}
