# The Python extension modules: _core (pybind11, over the C ABI) and _block_manager (Cython).
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
set(PYBIND11_FINDPYTHON ON)
find_package(pybind11 CONFIG REQUIRED)
include(UseCython)

file(GLOB PAGEDATTN_BINDING_SOURCES CONFIGURE_DEPENDS src/bindings/*.cpp)
pybind11_add_module(_core MODULE ${PAGEDATTN_BINDING_SOURCES})
target_link_libraries(_core PRIVATE pagedattn::pagedattn)
pagedattn_warnings(_core)

cython_transpile(python/pagedattn/_block_manager.pyx LANGUAGE CXX OUTPUT_VARIABLE PAGEDATTN_BLOCK_MANAGER_CXX)
python_add_library(_block_manager MODULE ${PAGEDATTN_BLOCK_MANAGER_CXX} WITH_SOABI)
target_include_directories(_block_manager PRIVATE python/pagedattn)

foreach(module _core _block_manager)
  # The library lies in pagedattn/lib, beside the extension modules.
  set_target_properties(${module} PROPERTIES INSTALL_RPATH "$ORIGIN/${CMAKE_INSTALL_LIBDIR}")
  install(TARGETS ${module} LIBRARY DESTINATION .)
endforeach()
